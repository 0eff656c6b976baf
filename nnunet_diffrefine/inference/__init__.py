"""A refiner over whole volumes whose prior is given."""
