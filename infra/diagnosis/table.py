"""Every check: name, why it matters, and the function that looks. docs/doctor.md has the same table; a test keeps it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import engine, kernel, network, state, sysctls
from .finding import Finding, warning
from .host import REPO, Host


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    why: str
    look: Callable[[Host], Finding]

    def of(self, host: Host) -> Finding:
        try:
            return self.look(host)
        except PermissionError as error:
            return warning(f"{error.filename} is closed to user {host.uid}", f"sudo {REPO}/infra/doctor")


CHECKS = (
    Check("architecture", "the runner's filters know its system calls by number", kernel.architecture),
    Check("kernel", "engine zygote hands volumes over as detached mounts", kernel.kernel),
    Check("landlock", "a request opens two files and no other, whatever code runs", kernel.landlock),
    Check("seccomp", "a request makes the few system calls that SQLite needs", kernel.seccomp),
    Check("user namespaces", "a slot has one for its zygote and one for its child", kernel.user_namespaces),
    Check("apparmor", "Docker's own profile denies slots every mount", kernel.apparmor),
    Check(
        "huge pages",
        "with `always` a clone that writes a byte may get 2 MB, with `never` it gets all its memory by pieces of 4 KB",
        kernel.huge_pages,
    ),
    Check("processor", "tenants share it, and read one another's memory by an open hole", kernel.vulnerabilities),
    Check("smt", "threads of a core share its caches", kernel.smt),
    Check("swap", "token keys and callers' data would get onto a disk", kernel.swap),
    Check("clock", "instances and keys live by it", kernel.clock),
    Check("python", "Mayfly is made of it", kernel.python),
    Check("open files", "every connection is one", kernel.open_files),
    *(Check(f"sysctl {name}", why, sysctls.check_of(name)) for name, why in sysctls.WHY.items()),
    Check("docker", "every request's container comes from it", engine.reachable),
    Check("docker version", "older ones lack what the containers are asked for", engine.version),
    Check("docker limits", "a request's memory, processes and processor time are bounded by cgroups", engine.limits),
    Check("docker swap limit", "so is what of it is swapped out", engine.swap_limit),
    Check("docker security", "the outer filter is Docker's to apply", engine.security_options),
    Check("docker users", "what the daemon makes of user ids", engine.remapped_users),
    Check("docker exposure", "whoever reaches its API is root", engine.exposure),
    Check("docker storage", "containers start fast where the image is not copied", engine.storage),
    Check("docker space", "containers do not start on a full disk", engine.data_root),
    *(Check(f"docker {name}", why, engine.check_of(name)) for name, why in engine.WHY.items()),
    Check("image", "it is what a request runs in", engine.image),
    Check("users", "a broken gateway reaches neither Docker nor a volume", state.users),
    Check("state", "instances, keys and logs are there", state.folder),
    Check("state owners", "each process reads its own and nothing else", state.owners),
    Check("state seal", "volumes inherit nosuid,nodev,noexec from it", state.sealed),
    Check("state file system", "renames are atomic within one, and a mount below it has flags of its own", state.one_file_system),
    Check("state space", "creates are refused on a full disk", state.space),
    Check("state inodes", "every instance takes five", state.inodes),
    Check("ports", "the HTTP API and the metrics listen there", network.ports),
    Check("listen", "tokens are secrets: strangers reach Mayfly by TLS alone", network.listen),
    Check("metrics", "figures are the operator's", network.metrics),
    Check("front", "limits count by caller, not by proxy", network.front),
)
