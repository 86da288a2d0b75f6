"""What runs: one module per deployment.

    from flows.upscale_video import upscale_video

    upscale_video("film.mkv", "film-2x.mkv")
"""
