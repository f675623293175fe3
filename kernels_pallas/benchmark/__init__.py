"""What `python -m kernels_pallas.bench` measures: cases, what runs them on each target, and the peers beside them."""
