# shellcheck shell=bash disable=SC2034 # the lists of packages are for those who source this
# What the commands in scripts have in common: sourced from the top of the project.

BUILD_PACKAGES=(python3-venv python3-dev gcc pkg-config libfuse3-dev)
SERVER_PACKAGES=(fuse3 dovecot-imapd)
TOOL_PACKAGES=(rsync attr libglib2.0-bin vim nano ed emacs-nox inotify-tools systemd groff-base)
KEYRING_PACKAGES=(dbus-daemon gnome-keyring)
PEER_PACKAGES=(isync bindfs sshfs rclone openssh-sftp-server)
GO_PACKAGES=(golang-go golang-github-emersion-go-imap-dev golang-github-emersion-go-imap-idle-dev)
WINDOW_PACKAGES=(xvfb pcmanfm xdotool imagemagick)
PICTURE_PACKAGES=(xterm adwaita-icon-theme fonts-dejavu-core fonts-noto-color-emoji fonts-wqy-microhei)

# The programs of a server are not in the PATH of an ordinary user.
PATH=$PATH:/usr/sbin:/sbin

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

python_is() {
    python3 -c "$1" >/dev/null 2>&1
}

# Asks for the thing itself and not for the package, so that it holds on every distribution.
have_package() {
    case $1 in
        python3-venv) python_is 'import ensurepip, venv' ;;
        python3-dev) python_is 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ;;
        gcc | pkg-config | bindfs | rclone | sshfs | rsync | vim | nano | ed | pcmanfm | xdotool | xterm) command -v "$1" >/dev/null ;;
        libfuse3-dev) pkg-config --exists fuse3 2>/dev/null ;;
        fuse3) command -v fusermount3 >/dev/null ;;
        dovecot-imapd) command -v dovecot >/dev/null && { [[ -x /usr/lib/dovecot/imap || -x /usr/libexec/dovecot/imap ]]; } ;;
        attr) command -v getfattr >/dev/null ;;
        libglib2.0-bin) command -v gio >/dev/null ;;
        emacs-nox) command -v emacs >/dev/null ;;
        systemd) command -v systemd-analyze >/dev/null ;;
        groff-base) command -v groff >/dev/null ;;
        dbus-daemon) command -v dbus-daemon >/dev/null ;;
        gnome-keyring) command -v gnome-keyring-daemon >/dev/null ;;
        openssh-sftp-server) [[ -x /usr/lib/openssh/sftp-server ]] ;;
        isync) command -v mbsync >/dev/null ;;
        inotify-tools) command -v inotifywait >/dev/null ;;
        golang-go) command -v go >/dev/null ;;
        golang-github-emersion-go-imap-dev) [[ -d /usr/share/gocode/src/github.com/emersion/go-imap ]] ;;
        golang-github-emersion-go-imap-idle-dev) [[ -d /usr/share/gocode/src/github.com/emersion/go-imap-idle ]] ;;
        xvfb) command -v Xvfb >/dev/null ;;
        adwaita-icon-theme) [[ -e /usr/share/icons/Adwaita/index.theme ]] ;;
        fonts-dejavu-core) [[ -e /usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf ]] ;;
        fonts-noto-color-emoji) [[ -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ]] ;;
        fonts-wqy-microhei) [[ -e /usr/share/fonts/truetype/wqy/wqy-microhei.ttc ]] ;;
        imagemagick) command -v import >/dev/null ;;
    esac
}

missing_packages() {
    local package
    for package in "$@"; do
        have_package "$package" || printf '%s\n' "$package"
    done
}

as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    else
        sudo "$@"
    fi
}

# Debian starts a mail server as soon as it is installed. Where there was none before, this machine shall not
# get one from here: it is kept from starting now, and from starting at the next boot.
install_packages() (
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
    server_is_new=
    if [[ " $* " == *" dovecot-imapd "* ]] && ! dpkg-query -s dovecot-core >/dev/null 2>&1; then
        server_is_new=yes
        if [[ ! -e /usr/sbin/policy-rc.d ]]; then
            trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
            # shellcheck disable=SC2016 # expanded when that script runs
            printf '#!/bin/sh\ncase $1 in dovecot*) exit 101 ;; esac\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
            as_root chmod 755 /usr/sbin/policy-rc.d
        fi
    fi
    as_root "${apt[@]}" update && as_root "${apt[@]}" install --no-install-recommends "$@" || return 1
    if [[ $server_is_new && -d /run/systemd/system ]]; then
        as_root systemctl --quiet disable --now dovecot.service dovecot.socket || true
    fi
)

set_up_packages() {
    local missing
    if command -v python3 >/dev/null && ! python_is 'import sys; assert sys.version_info >= (3, 11)'; then
        fail "imapfs needs Python 3.11 or newer, but python3 is $(python3 -V 2>&1)" \
            "install a newer one (Debian 12, Ubuntu 24.04 and later have it) and put it first in PATH as python3"
    fi
    mapfile -t missing < <(missing_packages "$@")
    [[ ${#missing[@]} -eq 0 ]] && return
    command -v apt-get >/dev/null ||
        fail "missing: ${missing[*]} (names as in Debian), and there is no apt-get here to install them" \
            "install what your distribution calls them, then run this again"
    [[ $EUID -eq 0 ]] || command -v sudo >/dev/null ||
        fail "missing: ${missing[*]}, and only root can install them, but there is no sudo here" \
            "as root, run: apt-get install ${missing[*]}"
    echo "setup: installing ${missing[*]}" >&2
    install_packages "${missing[@]}" >&2 || fail "apt-get could not install ${missing[*]}; its message is above"
    # libfuse3-dev cannot be seen before there is pkg-config, nor a new python3 before it is installed.
    hash -r
    mapfile -t missing < <(missing_packages "$@")
    [[ ${#missing[@]} -eq 0 ]] ||
        fail "still missing after apt-get: ${missing[*]}" \
            "python3 is $(command -v python3): if that is not Debian's, put /usr/bin first in PATH"
    python_is 'import sys; assert sys.version_info >= (3, 11)' ||
        fail "imapfs needs Python 3.11 or newer, but this distribution has $(python3 -V 2>&1)"
}

set_up_fuse() {
    [[ -e /dev/fuse ]] || [[ $EUID -ne 0 ]] || modprobe fuse 2>/dev/null || true
    [[ -e /dev/fuse ]] ||
        fail "/dev/fuse is missing: nothing can be mounted" \
            "load the kernel module (as root: modprobe fuse); start a container with --device /dev/fuse --cap-add SYS_ADMIN"
    [[ -r /dev/fuse && -w /dev/fuse ]] ||
        fail "/dev/fuse may not be opened by $(id -un): nothing can be mounted" "as root, run: chmod 666 /dev/fuse"
}

# Installs what lock files say into an environment, by hash, and then imapfs with the arguments after "--". Nothing
# else is taken: what has to be compiled is built with what requirements-build.lock says.
install_locked() {
    local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check) locks=()
    shift
    while [[ $1 != -- ]]; do
        locks+=(-r "$1")
        shift
    done
    shift
    if ! { "${pip[@]}" --require-hashes -r requirements-build.lock &&
        "${pip[@]}" --require-hashes --no-build-isolation "${locks[@]}" &&
        "${pip[@]}" --no-deps --no-build-isolation "$@"; }; then
        fail "pip could not install the packages of the lock files; its message is above" \
            "it needs the network (or a configured mirror); run this again when that is there"
    fi
}

# A virtual environment holds absolute paths, so a moved project needs a new one too.
set_up_venv() {
    local wanted
    wanted="$(python3 -c 'import sys; print(sys.version, sys.base_prefix)') $PWD"
    wanted+=" $(cat pyproject.toml requirements*.lock | sha256sum)"
    [[ -f .venv/stamp && $(<.venv/stamp) == "$wanted" ]] && return
    echo "setup: installing the Python packages into .venv; pyfuse3 is compiled, which takes up to a minute" >&2
    rm -rf .venv
    python3 -m venv .venv || fail "python3 -m venv failed; its message is above"
    install_locked .venv requirements-dev.lock -- -e .
    echo "$wanted" >.venv/stamp
}

# Mail servers conflict as packages, so those beside Dovecot are only unpacked, into .servers: their programs, and the
# libraries that this machine lacks. tests/support/servers/courier.py and cyrus.py start them.
set_up_second_server() {
    set_up_unpacked courier usr/bin/imapd 'gamin|courier-authlib' courier-imap && return
    command -v apt-get >/dev/null ||
        fail "the second server of the tests, Courier-IMAP, is taken from packages of Debian or Ubuntu," \
            "and there is no apt-get here: run the tests on one of these, or in a container of one"
    [[ $EUID -eq 0 ]] || command -v sudo >/dev/null ||
        fail "apt-get cannot download courier-imap, and only root can renew its list of packages" \
            "as root, run: apt-get update; then run this again"
    fail "Courier-IMAP could not be unpacked; the message is above" \
        "it needs the network (or a mirror known to apt-get), and on Ubuntu the component universe"
}

# NAME, one of its programs, a pattern of packages that it needs beside libraries, packages.
set_up_unpacked() {
    local wanted directory=.servers/$1
    wanted="$(. /etc/os-release && echo "$ID ${VERSION_ID-}") $(uname -m) $* $(declare -f unpack | sha256sum)"
    [[ -f $directory/stamp && $(<"$directory/stamp") == "$wanted" ]] && return
    command -v apt-get >/dev/null || return 1
    echo "setup: unpacking ${*:4} into $directory" >&2
    # The first attempt fails where apt-get has no list of packages yet, or one so old that they are gone.
    if ! unpack "$directory" "${@:2}" 2>/dev/null; then
        [[ $EUID -eq 0 ]] || command -v sudo >/dev/null || return 1
        as_root apt-get -q -q -o DPkg::Lock::Timeout=300 update >&2 || true
        unpack "$directory" "${@:2}" || return 1
    fi
    echo "$wanted" >"$directory/stamp"
}

# Names of libraries differ from one release to the next, so they are read from the packages that need them.
unpack() (
    rm -rf "$1"
    mkdir -p "$1/packages" && cd "$1/packages" || return 1
    declare -A seen=()
    program=$2 needed="^(lib.*|$3)\$"
    queue=("${@:4}")
    while [[ ${#queue[@]} -gt 0 ]]; do
        package=${queue[0]}
        queue=("${queue[@]:1}")
        [[ ! ${seen[$package]-} ]] || continue
        seen[$package]=yes
        download "$package" && dpkg-deb -x "$package"_*.deb .. || return 1
        while read -ra alternatives; do
            [[ ${alternatives[0]-} =~ $needed ]] || continue
            dependency=$(first_available "${alternatives[@]}") && queue+=("$dependency")
        done < <(dpkg-deb -f "$package"_*.deb Depends | tr ',' '\n' | sed -E 's/\([^)]*\)|:any|\|/ /g')
    done
    cd .. && rm -r packages
    unresolved=$(LD_LIBRARY_PATH=$(unpacked_libraries) ldd "$program" | grep 'not found') || return 0
    echo "$program of $4 lacks libraries: $unresolved" >&2
    return 1
)

unpacked_libraries() {
    find . -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:
}

# Without -o, apt warns that its own user may not write here.
download() {
    apt-get -q -q -o "APT::Sandbox::User=$(id -un)" download "$1"
}

# Prints the first of these packages that there is; fails if one is installed, so that none is needed.
first_available() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]] || return 1
    done
    for package in "$@"; do
        # The last is not looked up: if it is missing too, its download says so.
        if [[ $package == "${!#}" ]] || apt-cache show "$package" >/dev/null 2>&1; then
            echo "$package"
            return
        fi
    done
}

# Servers that are Python packages, in a virtual environment of their own.
set_up_python_servers() {
    local wanted directory=.servers/python list=tests/support/servers/programs/requirements.txt
    wanted="$(python3 -c 'import sys; print(sys.version)') $PWD $(sha256sum <"$list")"
    [[ -f $directory/stamp && $(<"$directory/stamp") == "$wanted" ]] && return
    echo "setup: installing pymap, mail-devel and Twisted into $directory" >&2
    rm -rf "$directory"
    python3 -m venv "$directory" || return 1
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$list" || return 1
    echo "$wanted" >"$directory/stamp"
}

# A whole Debian 13 for its Dovecot 2.4, which only root can run there.
set_up_new_dovecot() {
    local directory=.servers/trixie
    [[ ! -f $directory/stamp ]] || return 0
    [[ $EUID -eq 0 ]] && (set_up_packages debootstrap) || return 1
    echo "setup: unpacking Debian 13 with Dovecot 2.4 into $directory" >&2
    rm -rf "$directory"
    debootstrap --variant=minbase --include=dovecot-imapd trixie "$directory" >/dev/null || return 1
    touch "$directory/stamp"
}

# The memory server of go-imap, built into .servers/go with the libraries that Debian packages.
set_up_go_server() {
    local directory=.servers/go source=tests/support/servers/programs/goimap.go
    [[ $directory/goimap -nt $source ]] && return
    (set_up_packages "${GO_PACKAGES[@]}") || return 1
    echo "setup: building go-imap into $directory" >&2
    mkdir -p "$directory"
    GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=$PWD/$directory/cache go build -o "$directory/goimap" "$source" ||
        return 1
    rm -rf "$directory/cache"
    dpkg-query -W -f '${source:Upstream-Version}' golang-github-emersion-go-imap-dev >"$directory/version"
}
