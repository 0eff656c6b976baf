"""Refine predictions that exist already: checks, then one case after the other through the network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm import tqdm

from nnunet_diffrefine.calibration.record import Record
from nnunet_diffrefine.inference.background import Background
from nnunet_diffrefine.inference.case_work import CaseResult, CaseWork, Finished, Prepared, finish, prepare
from nnunet_diffrefine.inference.checks import (
    RECORD,
    check_content,
    check_dataset,
    check_headers,
    check_maps,
    check_record,
    check_request,
    check_spread,
)
from nnunet_diffrefine.inference.decided import other_decisions, with_record
from nnunet_diffrefine.inference.files import CaseFiles, OutputFolder, find_cases
from nnunet_diffrefine.inference.geometry import Geometry
from nnunet_diffrefine.inference.model import Model, load_model
from nnunet_diffrefine.inference.quality import Judge, write_table
from nnunet_diffrefine.inference.refine import RefineOptions, refine_volume
from nnunet_diffrefine.inference.region import RegionSettings
from nnunet_diffrefine.inference.request import Request
from nnunet_diffrefine.inference.windows import all_windows
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.stage_one.fingerprint import file_sha256, json_sha256


def apply(request: Request) -> list[CaseResult]:
    """Refine the cases of a request.

    Returns:
        One result a case that was worked on, in order.

    Raises:
        ValueError: bad input; nothing was refined.
        RuntimeError: the model cannot be used, memory ran out, or a background process died.
        OSError: a result could not be written; those before it are complete.
    """
    check_request(request)
    device = torch.device(request.device)
    model = load_model(request.dataset, request.refiner, request.folds, request.checkpoint, request.sampling, device)
    model = _calibrated(request, model)
    work = case_work(request, model)
    check_spread(request, model)
    check_maps(work)
    cases = _cases(request, model)
    record = settings_record(request, model, work)
    check_record(work, record)
    todo = _todo(request, work, cases)
    with work.output.begun():
        results = list(_run(request, model, work, todo, record))
        write_table(work.output, work.ending)
    if all(work.is_done(case.name) for case in cases):
        work.output.clear_up()
    print(summary(results, request, len(cases)))
    return results


def _calibrated(request: Request, model: Model) -> Model:
    """The model with the calibration that holds for it and for predictions with probabilities, if there is one."""
    model = with_record(model, request.refiner, request.folds, request.checkpoint, request.gate)
    return model if any(request.predictions.glob("*.npz")) else replace(model, record=None)


def _cases(request: Request, model: Model) -> list[CaseFiles]:
    """The cases of all parts."""
    names = model.dataset_json.get("channel_names") or model.dataset_json["modality"]
    cases = find_cases(request.images, request.predictions, model.dataset_json["file_ending"], len(names))
    check_dataset(request.predictions, model.dataset_json)
    return cases


def _todo(request: Request, work: CaseWork, cases: list[CaseFiles]) -> list[CaseFiles]:
    """The cases of this part that are not done yet; their headers agree."""
    cases = cases[request.part_id :: request.num_parts]
    if request.continue_prediction:
        cases = [case for case in cases if not work.is_done(case.name)]
    for case in tqdm(cases, desc="check headers", unit="case", disable=not request.progress, leave=False):
        check_headers(case)
    return cases


def _run(
    request: Request, model: Model, work: CaseWork, todo: list[CaseFiles], record: dict[str, Any]
) -> Iterator[CaseResult]:
    before, after = Background(request.npp, "-npp"), Background(request.nps, "-nps")
    quiet = not request.progress or not todo
    try:
        checked = before.ahead(check_content, ((case, work.geometry) for case in todo))
        for _ in tqdm(checked, total=len(todo), desc="check contents", unit="case", disable=quiet, leave=False):
            pass
        check_record(work, record)  # another part may have begun since
        for name, values in ((RECORD, record), ("plans.json", model.plans), ("dataset.json", model.dataset_json)):
            work.output.write_json(name, values)
        with tqdm(total=len(todo), desc="apply", unit="case", disable=quiet) as bar:
            waiting: list[CaseResult] = []
            for prepared in before.ahead(prepare, ((work, case) for case in todo)):
                finished, result = refine_case(request, model, prepared, bar)
                waiting.append(result)
                for changed in after.behind(finish, work, finished):
                    yield replace(waiting.pop(0), changed=changed)
                bar.update()
            for changed in after.rest():
                yield replace(waiting.pop(0), changed=changed)
    finally:
        before.close()
        after.close()


def refine_case(request: Request, model: Model, prepared: Prepared, bar: tqdm) -> tuple[Finished, CaseResult]:
    """Send a case through the network.

    Raises:
        RuntimeError: the device is out of memory.
    """
    name, passes = prepared.case.name, [0]

    def passed() -> None:
        passes[0] += 1
        bar.set_postfix_str(f"{name}, pass {passes[0]}", refresh=False)
        bar.update(0)

    image, prior, region = (torch.from_numpy(x) for x in (prepared.image, prepared.prior, prepared.region))
    known = model.record
    options = RefineOptions(
        torch.device(request.device), request.on_device, request.save_error_map, request.save_uncertainty, True,
        *((known.error_map.scaling, known.dice.scaling) if known else ()),
    )  # fmt: skip
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):  # same seed, same bytes
            refined = refine_volume(model.folds(), image, prior, region, model.patch, options, passed)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeError(
            f"Case {name} does not fit into the device's memory. Add --not_on_device. {error}"
        ) from error
    found = {"uncertainty": refined.spread, "error_map": refined.error}
    maps = {kind: values.numpy() for kind, values in found.items() if values is not None}
    logits = refined.logits.numpy() if refined.changed.any() else None
    shape = [max(n, p) for n, p in zip(prior.shape[1:], model.patch, strict=True)]
    share = float(region.float().mean())
    result = CaseResult(name, refined.windows, len(all_windows(shape, model.patch)), share, 0.0)
    assert refined.probabilities is not None, "asked for above"
    dice = judge_of(request, model).dice(refined.logits, refined.probabilities, model.network.foreground)
    return Finished(prepared.case, prepared.properties, prepared.prior, logits, maps, dice), result


def case_work(request: Request, model: Model) -> CaseWork:
    """What background processes have to know."""
    part = f"_{request.part_id}" if request.num_parts > 1 else ""
    return CaseWork(
        Geometry(model.plans, model.configuration, model.dataset_json),
        model.network.foreground,
        region_settings(request, model),
        request.soften,
        OutputFolder(request.output, part),
        request.save_probabilities,
        request.maps,
        judge_of(request, model),
    )


def judge_of(request: Request, model: Model) -> Judge:
    """What judges the results, with a note about what it does not know."""
    record, region = model.record, region_settings(request, model)
    notes = []
    if record is None:
        soft = any(request.predictions.glob("*.npz"))
        notes.append("not calibrated" if soft else "not calibrated: the input has no probabilities")
    else:
        if record.sampling != asdict(model.network.sampling):
            notes.append("calibrated with other sampling settings")
        if record.region != asdict(region):
            notes.append("calibrated with another region")
        if other := other_decisions(record, model.network.gate):
            notes.append(f"calibrated with another gate or offset of {', '.join(other)}")
    return Judge.of(record, model.network.foreground, "; ".join(notes))


def region_settings(request: Request, model: Model) -> RegionSettings:
    """What is refined."""
    everywhere = model.network.sampling.min_foreground == 0  # of methods that do not look at the prior
    return RegionSettings(**{"everywhere": everywhere, **(request.region or {})})


def settings_record(request: Request, model: Model, work: CaseWork) -> dict[str, Any]:
    """All that results depend on, and that one folder has to share."""
    sampling = model.network.sampling
    return {
        "model": str(model.folder),
        "folds": list(request.folds),
        "checkpoint": request.checkpoint,
        "checkpoint_sha256": {
            str(fold): file_sha256(model.folder / f"fold_{fold}" / request.checkpoint) for fold in request.folds
        },
        "sampling": asdict(sampling),
        "region": asdict(work.region),
        "soften": request.soften,
        "device": request.device,
        "on_device": request.on_device,
        "images": os.path.abspath(request.images),
        "predictions": os.path.abspath(request.predictions),
        "gate": _gate(model.network.gate),
        "calibration": None if model.record is None else calibration_of(model.record),
    }


def _gate(gate: Gate) -> dict[str, Any]:
    names = gate.foreground.names
    offsets = {name: offset for name, offset in zip(names, gate.offsets, strict=False) if offset}
    return {"unchanged": [names[channel] for channel in sorted(gate.unchanged)], "offsets": offsets}


def calibration_of(record: Record) -> dict[str, Any]:
    """What the maps and the table of a folder were calibrated with."""
    return {
        "error_map": record.error_map.source,
        "predicted_dice": record.dice.source,
        "cases": record.cases,
        "record": json_sha256(asdict(record)),
    }


def summary(results: Sequence[CaseResult], request: Request, cases: int) -> str:
    """One line about what was done with this part of the cases."""
    output, part = request.output, request.part_id
    if part >= cases:
        return f"Nothing to do: there are {cases} case(s) for {request.num_parts} parts, and none for -part_id {part}."
    if not results:
        of_part = f" of -part_id {part}" if request.num_parts > 1 else ""
        return f"Nothing to do: every case{of_part} is complete in {output}."
    visited, everything = sum(r.windows for r in results), sum(r.all_windows for r in results)
    changed = sum(r.changed for r in results) / len(results)
    return (f"{len(results)} case(s) refined in {output}: {visited} of {everything} windows visited, "
            f"{100 * changed:.3f} % of the voxels changed in the mean case.")  # fmt: skip
