#!/bin/sh
# `make run`: upscale VIDEO, or the sample clip, into OUTPUT, or a name of its own under output/.
set -eu
cd "$(dirname "$0")/.."
video=$1 output=$2
shift 2
if [ -z "$video" ]; then
    mkdir -p output
    video=output/sample.mp4
    [ -s "$video" ] || .venv/bin/python -m tasks.media.sample "$video"
fi
if [ -z "$output" ]; then
    mkdir -p output
    name=$(basename "$video")
    output=output/${name%.*}-upscaled.mp4
    set -- --overwrite "$@"
fi
exec .venv/bin/superres upscale "$video" "$output" "$@"
