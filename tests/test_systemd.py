"""The systemd units and infra/compose on a Debian 12 of their own, with its kernel, systemd, AppArmor and Docker.

MAYFLY_TEST_SYSTEMD=1 runs this: it takes several minutes, and qemu-system-x86, mmdebstrap and e2fsprogs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .guest import Guest, guest

pytestmark = pytest.mark.skipif(
    os.environ.get("MAYFLY_TEST_SYSTEMD") != "1", reason="MAYFLY_TEST_SYSTEMD=1 boots a virtual machine"
)

SETTINGS = "MAYFLY_RATE_REQUESTS_PER_MINUTE=0\\nMAYFLY_RATE_CREATES_PER_MINUTE=0\\nMAYFLY_TTL_SECONDS=3600\\n"
PREPARE = f"docker load -qi /root/images.tar; printf '{SETTINGS}' > /etc/mayfly.env; set -a; . /etc/mayfly.env; set +a; "
UNITS = """
/opt/mayfly/infra/up -d && /opt/mayfly/infra/down
cp /opt/mayfly/infra/systemd/* /etc/systemd/system/ && systemctl daemon-reload
systemctl enable --now var-lib-mayfly.mount mayfly-launcher mayfly-web
"""
FUNCTIONS = """
sql() {
    curl -fsS -D /root/headers http://127.0.0.1:8080/sql -H 'Content-Type: application/json' \\
        ${2:+-H "X-Walkin-Session: $2"} -d "{\\"sql\\": \\"$1\\"}"
}
has_the_row() {
    for try in $(seq 600); do sql 'SELECT x FROM t' "$(cat /root/token)" 2>/root/error && return; sleep 0.2; done
    cat /root/error; return 1
}
start_an_instance() {
    for try in $(seq 600); do curl -fs http://127.0.0.1:8080/healthz >/dev/null && break; sleep 0.2; done
    sql 'CREATE TABLE t(x); INSERT INTO t VALUES (42)'
    sed -n 's/^X-Walkin-Session: //p' /root/headers | tr -d '\\r' >/root/token
}
"""
ROW = '{"columns":["x"],"rows":[[42]],"rows_affected":0}'


@pytest.fixture(scope="module")
def debian() -> Iterator[Guest]:
    with guest() as machine:
        machine.run(PREPARE + UNITS + FUNCTIONS + "start_an_instance", 600)
        yield machine


def asked(debian: Guest, before: str = "") -> str:
    return debian.run(f"{FUNCTIONS}{before}\nhas_the_row").splitlines()[-1]


def main_process(debian: Guest, unit: str) -> str:
    return debian.run(f"systemctl show -P MainPID {unit}").strip()


def test_both_units_serve_with_engine_zygote_under_apparmor(debian):
    assert asked(debian) == ROW
    told = debian.run("curl -fs http://127.0.0.1:8080/healthz")
    assert '"engine":"zygote"' in told
    assert '"separation":true' in told
    assert debian.run("docker inspect -f '{{.AppArmorProfile}}' $(docker ps -q) | sort -u").strip() == "mayfly-slot"
    assert debian.run("journalctl -k --no-pager | grep -c 'DENIED.*mayfly' || true").strip() == "0"


@pytest.mark.parametrize(
    ("unit", "capabilities", "closed"),
    [
        ("mayfly-launcher", 1 << 21, "/var/lib/mayfly/keys /var/lib/mayfly/log /var/lib/docker /root"),
        ("mayfly-web", 0, "/var/lib/mayfly/instances /var/lib/mayfly/launcher /var/lib/docker /root"),
    ],
)
def test_running_process_is_confined_as_its_unit_says(debian, unit, capabilities, closed):
    pid = main_process(debian, unit)
    status = dict(line.split(":\t", 1) for line in debian.run(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {capabilities}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    entered = f"nsenter -t {pid} -m setpriv --reuid {unit} --regid {unit} --init-groups"
    script = f"for path in {closed}; do ! {entered} ls $path 2>/dev/null || exit 1; done"
    debian.run(script)
    debian.run(f"for path in /etc /opt/mayfly /var/lib; do ! {entered} touch $path/x 2>/dev/null || exit 1; done")
    assert float(debian.run(f"systemd-analyze security --no-pager {unit} | grep -o 'service: [0-9.]*'").split()[1]) <= 1.1


@pytest.mark.parametrize("unit", ["mayfly-web", "mayfly-launcher"])
def test_killed_unit_is_started_again_and_the_instance_is_still_there(debian, unit):
    before = main_process(debian, unit)
    assert asked(debian, f"kill -9 {before}; tail --pid={before} -f /dev/null") == ROW
    assert main_process(debian, unit) not in ("0", before)


@pytest.mark.parametrize("unit", ["mayfly-web", "mayfly-launcher", "docker"])
def test_each_can_be_restarted_alone(debian, unit):
    assert asked(debian, f"systemctl restart {unit}") == ROW


def test_stop_answers_what_is_at_hand_and_leaves_no_container(debian):
    slow = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c"
    # The runner's own answer to a query without end, which was at work when the units were stopped.
    script = f"""
curl -s http://127.0.0.1:8080/sql -H 'Content-Type: application/json' -d '{{"sql": "{slow}"}}' >/root/slow &
for try in $(seq 200); do curl -s http://127.0.0.1:8080/healthz | grep -q '"running":1' && break; sleep 0.02; done
systemctl stop mayfly-web mayfly-launcher
wait
cat /root/slow; docker ps -aq; systemctl start mayfly-web mayfly-launcher"""
    assert debian.run(script).strip().startswith('{"error":"query timeout"')
    assert asked(debian) == ROW


def test_after_a_reboot_everything_comes_up_by_itself(debian):
    debian.reboot()
    assert asked(debian) == ROW
    assert debian.run("findmnt -no OPTIONS /var/lib/mayfly").strip() == "rw,nosuid,nodev,noexec,relatime"


def test_compose_takes_over_and_survives_a_reboot_too(debian):
    script = "systemctl disable --now mayfly-web mayfly-launcher; systemctl enable --now var-lib-mayfly.mount mayfly-apparmor"
    debian.run(f"{PREPARE}{script}; /opt/mayfly/infra/compose up -d", 600)
    assert asked(debian) == ROW
    debian.reboot()
    assert asked(debian) == ROW
    assert '"engine":"zygote"' in debian.run("curl -fs http://127.0.0.1:8080/healthz")
