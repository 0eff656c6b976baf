"""Tables and comparisons made from the metrics of ``nnUNetv2_diffrefine evaluate``."""
