"""Video as exact data: probing, timestamps, chunk files, decoding, encoding and joining. No Prefect, no Dask."""
