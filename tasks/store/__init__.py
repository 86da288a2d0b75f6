"""The media store: videos of any size in and out of S3, whole or not at all."""
