"""What is wrong with a mask: error maps and the way back, nesting, errors made on purpose, distance to the surface."""
