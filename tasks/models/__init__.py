"""Super-resolution networks: model cards, weight files, the official networks and the inference engine.

Imports neither Prefect nor Dask, and importing the package alone does not load torch.
"""
