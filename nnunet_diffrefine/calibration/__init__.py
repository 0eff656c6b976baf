"""What the cross-validation says about a refiner: where it helps, how sure it may be, and the record of both."""
