"""What runs: one module per deployment.

Import a flow from its module:

    from flows.upscale_video import upscale_video

    upscale_video("film.mkv", "film-2x.mkv")

The package itself loads nothing, so that the command line can refuse bad input without waiting for Prefect.
"""
