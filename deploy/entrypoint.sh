#!/bin/sh
# The command of the container: train, sample, ... of dpm-scales, or a program such as torchrun or python.
# `train.py` is `train`, as in a checkout.
set -eu
case "${1:-train}" in
    *.py)
        command="${1%.py}"
        shift
        set -- dpm-scales "$command" "$@"
        ;;
    torchrun | python | python3 | sh | bash | dpm-scales) ;;
    *) set -- dpm-scales "$@" ;;
esac
exec "$@"
