"""A synthetic brain-tumour dataset in nnU-Net's raw format, to try the package end to end without patient data."""
