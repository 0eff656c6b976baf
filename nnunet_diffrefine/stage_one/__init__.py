"""Out-of-fold priors of stage one: export, storage, manifest and leak check."""
