#!/bin/sh
# Compares a run with a baseline, on any CI. Exit code: 0 passed, 2 wrong input, 3 a gate failed, 4 something is missing.
#
#   RUN=runs/demo BASELINE=baseline.npz examples/ci/verify.sh
#
# RUN            folder of the finished run
# BASELINE       file of `dfadc baseline RUN -o FILE`, made when the student was last accepted
# MAX_DROP       drop of agreement and accuracy that fails if it is significant (0.01, a point)
# REQUIRE        artifacts that must run here, such as "student.onnx student.int8.onnx"
# DATA           labelled images, folder or .npz, optional; MIN_ACCURACY needs them
# OUT            folder of junit.xml and report.json (verification)
set -eu

run=${RUN:?the folder of a finished run}
baseline=${BASELINE:?the file of: dfadc baseline RUN -o FILE}
out=${OUT:-verification}
mkdir -p "$out"

set -- --baseline "$baseline" --max-drop "${MAX_DROP:-0.01}" --junit "$out/junit.xml" --json
for artifact in ${REQUIRE:-}; do
    set -- "$@" --require "$artifact"
done
if [ -n "${DATA:-}" ]; then
    set -- "$@" --data "$DATA"
fi
if [ -n "${MIN_ACCURACY:-}" ]; then
    set -- "$@" --min-accuracy "$MIN_ACCURACY"
fi

# The last command: its exit code is the job's.
dfadc verify "$run" "$@" >"$out/report.json"
