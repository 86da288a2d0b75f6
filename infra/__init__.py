"""Where it runs: worker pools, the Prefect API of one-machine runs, Slurm, cloud and images."""
