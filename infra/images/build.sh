#!/bin/bash
# Builds an image, and says by digest what was built: nothing refers to it by a name that can move.
#
# build.sh server|worker [--base IMAGE] [--torch cpu|cuda] [--tag TAG] [--output FOLDER]
#                        [--push REPOSITORY] [--enroot FILE.sqsh]
#
# --base     image to build on, best with its digest (default: the one that the Dockerfile names)
# --torch    build of torch in the worker's image (default: cuda)
# --tag      a name for people (default: the commit)
# --output   folder for NAME.digest, NAME.sbom.json (CycloneDX) and, without --push, NAME.tar (default: dist)
# --push     repository to push to, such as 123456789012.dkr.ecr.eu-central-1.amazonaws.com/superres-worker
# --enroot   file for what was pushed, as enroot and Pyxis run it, such as /fsx/images/superres-worker-1.0.0.sqsh
#
# A tag stays what it is: one that the repository has is refused before anything is built. Log in first, with
# `buildah login`. Files appear in the folder when all is done; what fails leaves it as it was.
#
# enroot logs in by itself, with $ENROOT_CONFIG_PATH/.credentials. No distribution has it, so it is not run in the
# tests, which look at what it is asked for; by hand, enroot 4.1.2 was seen to import what was pushed.
#
# Works with buildah, as root or not. BUILD_ARGS holds more options of `buildah build`. Where packages come through a
# mirror, PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX and PIP_CERT say so, with paths as they are in the build.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "build: $*" >&2; }
fail() { say "error: $*"; exit 1; }

name=${1:-}
[ -f "infra/images/$name.Dockerfile" ] || fail "there is no image called '$name'. Use server or worker."
shift
base='' torch=cuda output=dist push='' enroot=''
tag=$(git rev-parse --short=12 HEAD 2>/dev/null || echo latest)
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || fail "$1 needs a value"
    case $1 in
        --base) base=$2 ;;
        --torch) torch=$2 ;;
        --tag) tag=$2 ;;
        --output) output=$2 ;;
        --push) push=$2 ;;
        --enroot) enroot=$2 ;;
        *) fail "there is no option $1" ;;
    esac
    shift 2
done
[[ $torch =~ ^(cpu|cuda)$ ]] || fail "there is no build of torch called $torch. Use cpu or cuda."
command -v buildah >/dev/null || fail "buildah is not installed. Debian: apt-get install buildah"
if [ -n "$enroot" ]; then
    [ -n "$push" ] || fail "--enroot takes what was pushed. Name a repository with --push."
    [ ! -e "$enroot" ] || fail "$enroot is there, and enroot does not replace files. Remove it, or name another."
    command -v enroot >/dev/null || fail "enroot is not installed. Run this on a node, or leave --enroot out."
fi

# The digest of an image in a registry, or why there is none. Through a list of images that is thrown away: of all that
# buildah can do, this reads least and logs in.
look_up() {
    local list=localhost/superres-look-up:$$ said status=0
    buildah manifest create "$list" >/dev/null
    said=$(buildah manifest add "$list" "docker://$1" 2>&1) || status=1
    buildah manifest rm "$list" >/dev/null
    said=${said##*$'\n'}
    echo "${said##"Error: "}"
    return $status
}
if [ -n "$push" ]; then
    # Registries differ in what they call a repository that nothing was pushed to.
    if said=$(look_up "$push:$tag"); then
        fail "$push:$tag is there, as ${said##* }, and a tag stays what it is. Use that, or name this by another --tag."
    elif [[ $said != *'manifest unknown'* && $said != *'name unknown'* ]]; then
        fail "$push:$tag cannot be looked up ($said). Log in with 'buildah login ${push%%/*}', or name another" \
            "repository."
    fi
fi

read -ra more <<<"${BUILD_ARGS:-}"
arguments=(--build-arg "TORCH=$torch")
[ "$name" = worker ] || arguments=()
[ -z "$base" ] || arguments+=(--build-arg "BASE=$base")
for setting in PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX PIP_CERT; do
    [ -z "${!setting:-}" ] || arguments+=(--build-arg "$setting=${!setting}")
done

mkdir -p "$output"
draft=$(mktemp -d "$output/.partial-XXXXXX")
container=''
cleanup() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null
    rm -rf "$draft"
}
trap cleanup EXIT

# Docker's format keeps the health check. What git does not know of stays out.
mkdir "$draft/context"
git ls-files -z | tar -c --null --files-from=- | tar -x -C "$draft/context"
image=localhost/superres-$name:$tag
say "building $image"
buildah build --format docker --layers=false "${arguments[@]}" "${more[@]}" \
    --file "infra/images/$name.Dockerfile" --tag "$image" "$draft/context" >&2

# What is in it was written down while it was built.
container=$(buildah from --pull-never "$image")
buildah run "$container" -- cat /opt/superres/sbom.json >"$draft/$name.sbom.json"

# The digest is of what was written, and so known only afterwards.
if [ -n "$push" ]; then
    say "pushing to $push:$tag"
    buildah push --digestfile "$draft/$name.digest" "$image" "docker://$push:$tag" >&2 ||
        fail "$push did not take $image, which was built; why is above."
    reference=$push@$(cat "$draft/$name.digest")
else
    buildah push --digestfile "$draft/$name.digest" "$image" "docker-archive:$draft/$name.tar:$image" >&2
    reference=$image@$(cat "$draft/$name.digest")
fi
rm -f "$output/$name.tar"
mv "$draft/$name".* "$output"

if [ -n "$enroot" ]; then
    enroot import --output "$enroot" "docker://${push/\//#}:$(cat "$output/$name.digest")" >&2 ||
        fail "$reference was pushed, but not written to $enroot; why is above."
fi
echo "$reference"
