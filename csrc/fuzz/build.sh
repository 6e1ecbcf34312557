#!/usr/bin/env bash
# Builds the fuzz targets as OSS-Fuzz asks for them: from every NAME_fuzzer.cpp a program of that name in $OUT, beside it
# NAME_fuzzer_seed_corpus.zip and NAME_fuzzer.dict. $CXX, $CXXFLAGS and $LIB_FUZZING_ENGINE say how; `make fuzz` uses it too.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORK=$(mktemp -d)
trap 'rm -r "$WORK"' EXIT
for name in header json file weight_map; do
  $CXX $CXXFLAGS -std=c++17 -Icsrc -c "csrc/$name.cpp" -o "$WORK/$name.o"
done
for source in csrc/fuzz/*_fuzzer.cpp; do
  name=$(basename "$source" .cpp)
  $CXX $CXXFLAGS -std=c++17 -Icsrc "$source" "$WORK"/*.o $LIB_FUZZING_ENGINE -o "$OUT/$name"
  python3 -m zipfile -c "$OUT/${name}_seed_corpus.zip" "csrc/fuzz/corpus/$name/"*
  cp csrc/fuzz/safetensors.dict "$OUT/$name.dict"
done
