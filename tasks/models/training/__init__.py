"""Training of the bundled models, `compact` and `standard`, from procedurally generated pictures alone.

No photograph and no video is needed: `procedural` draws pictures, `degradation` derives low-resolution frames from
them, `pool` keeps pairs of both on disk, `device_samples` cuts samples of them on a GPU, `train` fits the network and
`evaluate` measures weights on real clips.

    python -m tasks.models.training --scale 2 --minutes 60 --out runs/x2
    python -m tasks.models.training --scale 4 --minutes 60 --out runs/x4 --pool runs/x2/pool \
        --initial runs/x2/compact-x2.safetensors
    python -m tasks.models.training.evaluate --clips clip.mp4 --models runs/x2/compact-x2.safetensors

A run that was stopped goes on with `--resume` added to the same command.
"""
