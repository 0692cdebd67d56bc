#!/usr/bin/env bash
# Shared by up, down, test and bench: what must be on the machine, and how the two processes are started and stopped.
# Source it; every function ends the script with a message when it can't do its work.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
state=$(realpath -m "${MAYFLY_STATE_DIR:-/var/lib/mayfly}")
listen=${MAYFLY_LISTEN:-127.0.0.1:8080}
image=${MAYFLY_IMAGE:-mayfly-runner:latest}
engine=${MAYFLY_ENGINE:-auto}
operator=$state/operator # pid files and the operator's logs
python=/usr/bin/python3  # not whatever is first in PATH: the service's users must be able to run it
export MAYFLY_STATE_DIR=$state MAYFLY_LISTEN=$listen MAYFLY_IMAGE=$image
[ -z "${MAYFLY_DOCKER_SOCKET:-}" ] || export DOCKER_HOST=$MAYFLY_DOCKER_SOCKET

say() { printf 'mayfly: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}
is_root() { [ "$(id -u)" -eq 0 ]; }
has_systemd() { [ -d /run/systemd/system ]; }
docker_answers() { timeout 10 docker version >/dev/null 2>&1; }
has_apparmor() { [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ]; }

# use_preset NAME: the settings of infra/presets/NAME.env, but for those that the environment has.
use_preset() {
    local known key value
    known=$(cd "$repo/infra/presets" && ls -- *.env | sed 's/\.env$//')
    grep -qxF -e "$1" <<<"$known" || die "no preset '$1'; there are: ${known//$'\n'/ }"
    while IFS='=' read -r key value; do
        case "$key" in MAYFLY_*) [ -n "${!key+set}" ] || export "$key=$value" ;; esac
    done <"$repo/infra/presets/$1.env"
}

# --- what must be on the machine

# missing_packages [PACKAGE…]: what Mayfly needs, and packages whose program has their name.
missing_packages() {
    local name
    for name; do command -v "$name" >/dev/null || [ -x "/usr/sbin/$name" ] || echo "$name"; done
    command -v docker >/dev/null && command -v dockerd >/dev/null || echo docker.io
    command -v mmdebstrap >/dev/null || echo mmdebstrap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    command -v curl >/dev/null || echo curl
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    ! is_root || ! has_apparmor || command -v apparmor_parser >/dev/null || echo apparmor
}

install_prerequisites() {
    local missing
    missing=$(missing_packages "$@" | tr '\n' ' ')
    if [ -n "$missing" ]; then
        is_root || die "missing packages; as root: apt-get install $missing"
        command -v apt-get >/dev/null || die "missing: $missing (this machine has no apt-get to install them)"
        say "installing $missing"
        apt-get update -qq || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
            die "apt-get install $missing failed"
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11"
}

# With systemd the distribution's service is used; without it the daemon is started here, and stopped by infra/down.
start_docker() {
    docker_answers && return
    [ -z "${MAYFLY_DOCKER_SOCKET:-}" ] || die "no Docker daemon answers at MAYFLY_DOCKER_SOCKET=$MAYFLY_DOCKER_SOCKET"
    is_root || die "no Docker daemon answers; as root: systemctl start docker, and: usermod -aG docker $(id -un)"
    if has_systemd; then
        systemctl start docker || die "systemctl start docker failed"
    else
        say "starting dockerd"
        mkdir -p "$operator"
        setsid dockerd >"$operator/dockerd.log" 2>&1 </dev/null 9>&- &
        note_process dockerd $!
    fi
    local tries
    for tries in $(seq 150); do
        docker_answers && return
        sleep 0.2
    done
    die "dockerd did not come up; see $operator/dockerd.log"
}

# Docker's own AppArmor profile forbids what a slot container does; a host without AppArmor needs none.
load_slot_profile() {
    is_root && has_apparmor && [ "$engine" != docker ] || return 0
    "$repo/infra/apparmor/load" && return
    [ "$engine" = auto ] || die "cannot load the slots' AppArmor profile: $repo/infra/apparmor/load failed"
    say "no engine zygote without its AppArmor profile: $repo/infra/apparmor/load failed; once it does not, restart Mayfly"
}

# install_python [EXTRA [FOLDER]]: an environment, .venv unless named, made anew only when pyproject.toml or the wanted extra changed.
install_python() {
    local wanted=".${1:+[$1]}" venv=${2:-.venv} stamp
    stamp="$("$python" -V) $wanted $(sha256sum <"$repo/pyproject.toml")"
    # The test environment serves as the plain one too.
    case "$(cat "$repo/$venv/mayfly-stamp" 2>/dev/null)" in
    "$stamp" | "${stamp/ . / .[test] }") return ;;
    esac
    say "making $venv"
    # In place where it can be: a service may be running from it.
    [ "$("$repo/$venv/bin/python" -V 2>/dev/null)" = "$("$python" -V)" ] || "$python" -m venv --clear "$repo/$venv"
    (cd "$repo" && "$venv/bin/pip" install --quiet --disable-pip-version-check -e "$wanted") || die "pip install failed"
    echo "$stamp" >"$repo/$venv/mayfly-stamp"
}

# --- the state folder

is_sealed() {
    "$python" -c '
import os, sys
sealed = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
sys.exit(os.statvfs(sys.argv[1]).f_flag & sealed != sealed)' "$state"
}

# The state folder is a mount of itself with nosuid,nodev,noexec: Docker's bind mounts take no such options, they inherit them.
# Without root the mount is asked of the Docker daemon, whose group is as powerful as root.
seal_state() {
    is_sealed && return
    if is_root; then
        mount --bind "$state" "$state" && mount -o remount,bind,nosuid,nodev,noexec "$state" || die "cannot mount $state"
    else
        mount_by_docker seal
    fi
    is_sealed || die "$state is not mounted nosuid,nodev,noexec"
}

unseal_state() {
    mountpoint -q "$state" || return 0
    if is_root; then umount "$state"; else mount_by_docker unseal; fi
}

mount_by_docker() {
    docker run --rm --privileged --pid host --network none --entrypoint /usr/bin/python3.13 "$image" -I -S -c '
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
NOSUID_NODEV_NOEXEC, REMOUNT, BIND, CLONE_NEWNS = 2 | 4 | 8, 32, 4096, 0x20000
def call(name, *args):
    if getattr(libc, name)(*args):
        sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")
path = sys.argv[2].encode()
call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), CLONE_NEWNS)
if sys.argv[1] == "seal":
    call("mount", path, path, None, BIND, None)
    call("mount", None, path, None, BIND | REMOUNT | NOSUID_NODEV_NOEXEC, None)
else:
    call("umount2", path, 0)
' "$1" "$state" || die "cannot $1 $state"
}

web_user=mayfly-web
launcher_user=mayfly-launcher

make_users() {
    is_root || return 0
    getent passwd $web_user >/dev/null || useradd --system --user-group --no-create-home --shell /usr/sbin/nologin $web_user
    getent passwd $launcher_user >/dev/null || useradd --system --user-group --no-create-home --shell /usr/sbin/nologin $launcher_user
    id -nG $launcher_user | grep -qw docker || usermod -aG docker $launcher_user
}

# A clone that was made under umask 077 is root's alone.
check_clone() {
    is_root || return 0
    local closed
    closed=$(
        find "$repo" "$repo/.venv" -maxdepth 0 -type d ! -perm -005
        find "$repo/gateway" -type d ! -perm -005 -o -type f ! -perm -004
    )
    [ -z "$closed" ] || die "the service's users cannot read ${closed%%$'\n'*}; open the clone to them: chmod -R o+rX $repo"
}

make_state() {
    mkdir -p "$operator"
    if is_root; then
        chmod 755 "$state"
        install -d -m 700 -o $launcher_user -g $launcher_user "$state/instances" "$state/launcher"
        install -d -m 2750 -o $launcher_user -g $web_user "$state/run"
        install -d -m 700 -o $web_user -g $web_user "$state/keys" "$state/log"
    else
        install -d -m 700 "$state/instances" "$state/launcher" "$state/run" "$state/keys" "$state/log"
    fi
    chmod 700 "$operator"
    local user
    for user in $(! is_root || echo $launcher_user $web_user); do
        setpriv --reuid "$user" --regid "$user" --init-groups test -x "$state/run/.." ||
            die "user $user cannot enter $state: a folder above it is closed to others; choose another with MAYFLY_STATE_DIR"
    done
}

# --- the two processes

# Under engine zygote the launcher hands a slot each request's volume as a detached mount: open_tree and mount_setattr ask for
# CAP_SYS_ADMIN over the mount namespace that the launcher is in. Engine docker needs none, and the gateway never does.
capabilities() { [ "$1" != launcher ] || [ "$engine" = docker ] || echo ,+sys_admin; }

# spawn NAME USER COMMAND…: in the background, with an environment of MAYFLY_* alone, its log and pid file in $operator. As root it gets
# its user, its capabilities and no way to others, and its own mount namespace in which the clone is read-only at /srv: the clone
# may lie in a folder that this user cannot enter. The capability is ambient, so that it outlives the change of user and the exec of
# an ordinary program; no_new_privs does not take it, and the bounding set holds nothing else.
spawn() {
    local name=$1 user=$2 settings
    shift 2
    mapfile -d '' -t settings < <(env -0 | grep -z '^MAYFLY_' | grep -zv '^MAYFLY_IMAGE_SQLITE=' || true)
    local clean=(env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "${settings[@]}")
    local command=("$repo/.venv/bin/python" "$@")
    if is_root; then
        command=(unshare --mount --propagation slave sh -c '
            mount --bind "$0" /srv && mount -o remount,bind,ro,nosuid,nodev /srv && cd /srv || exit 1
            user=$1 caps=-all$2; shift 2
            exec setpriv --reuid "$user" --regid "$user" --init-groups \
                --inh-caps="$caps" --ambient-caps="$caps" --bounding-set="$caps" --no-new-privs "$@"
        ' "$repo" "$user" "$(capabilities "$name")" /srv/.venv/bin/python "$@")
    fi
    # Every caller is a descriptor, so as many as there may be.
    (cd "$repo" && ulimit -n "$(ulimit -Hn)" && exec setsid "${clean[@]}" "${command[@]}") \
        >>"$operator/$name.log" 2>&1 </dev/null 9>&- &
    note_process "$name" $!
}

# A pid file outlives a reboot, and its number may be another's then: what it names is ours only if it began when ours did.
began() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }
note_process() { echo "$2 $(began "$2")" >"$operator/$1.pid"; }
alive() { grep -qE '^State:[[:space:]]+[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null; }

running() {
    local pid start
    read -r pid start 2>/dev/null <"$operator/$1.pid" && [ -n "$start" ] && [ "$(began "$pid")" = "$start" ] && alive "$pid"
}

# stop NAME SECONDS: SIGTERM, then SIGKILL.
stop() {
    local pid tries
    if running "$1"; then
        read -r pid _ <"$operator/$1.pid"
        kill "$pid" 2>/dev/null || true
        for tries in $(seq $(($2 * 10))); do
            alive "$pid" || break
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$operator/$1.pid"
}

listening() { "$python" -c 'import socket, sys; host, _, port = sys.argv[1].rpartition(":"); socket.create_connection((host.strip("[]"), int(port)), 2)' "$listen" 2>/dev/null; }

healthy() { curl -fsS --max-time 2 "http://$listen/healthz" >/dev/null 2>&1; }

start_service() {
    if is_root; then export MAYFLY_WEB_UID=$(id -u $web_user); fi
    running launcher || spawn launcher $launcher_user -m gateway.launcher
    if ! running web; then
        ! listening || die "something else listens on $listen; choose another with MAYFLY_LISTEN"
        spawn web $web_user -m gateway.web
    fi
    local tries
    for tries in $(seq 300); do
        running launcher || die "the launcher ended: $(tail -n 5 "$operator/launcher.log")"
        running web || die "the gateway ended: $(tail -n 5 "$operator/web.log")"
        healthy && return
        sleep 0.1
    done
    die "no health within 30 s: $(curl -sS --max-time 2 "http://$listen/healthz" 2>&1); logs are in $operator"
}

stop_service() {
    stop web 10
    stop launcher 15
    local deployment containers
    if deployment=$(cat "$state/launcher/deployment-id" 2>/dev/null) && docker_answers; then
        containers=$(docker ps -aq --filter "label=org.mayfly.deployment=$deployment")
        [ -z "$containers" ] || docker rm -f $containers >/dev/null
    fi
    unseal_state
}

stop_docker_if_ours() { stop dockerd 30; }
