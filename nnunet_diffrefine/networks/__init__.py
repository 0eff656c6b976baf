"""Networks: timestep conditioning for nnU-Net's planned architectures, and stage one plus refiner in one module."""
