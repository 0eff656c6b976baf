"""What a second process runs in the test of concurrent writers; apart, so that it need not import nnU-Net."""

from nnunet_diffrefine.stage_one.manifest import CaseRecord, update

RECORD = CaseRecord(0, [2, 3, 4, 5], "0" * 64, 99)


def add_cases(folder, prefix, count):
    for i in range(count):
        update(folder, lambda manifest, i=i: manifest.with_case(f"{prefix}{i}", RECORD))
