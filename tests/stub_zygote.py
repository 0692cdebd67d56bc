"""Speaks the zygote's side of docs/wire.md without any container: what a run's caller orders, it says to the launcher.

`python stub_zygote.py ADDRESS [FIRST]`: with FIRST, a packet as hex, it sends that instead of READY, and waits for the end of its
control. A caller's order is one line of JSON:

    {"reports": [HEX]} send these packets, whatever they are; {run} in them is the run's ordinal as 8 hex digits
    {"status": N}      end so, with "flags"
    {"wait": N}        wait for KILL first, then end with status N; null: never end
    {"exit": N}        end the zygote
    {"reply": TEXT}    send this to the caller before
    {"stat": [NAME]}   send the caller the mount's flags, which of these are in the volume, and the command, before
"""

import json
import os
import select
import socket
import struct
import sys

HEADER = struct.Struct("!BBHI")
REPORT = struct.Struct("!BBHIi")


def receive(sock, descriptors):
    packet, rights, _, _ = sock.recvmsg(64, socket.CMSG_SPACE(4 * descriptors))
    return packet, [item[0] for _, _, data in rights for item in struct.iter_unpack("i", data)]


def read_line(sock):
    line = b""
    while not line.endswith(b"\n"):
        piece = sock.recv(1 << 16)
        if not piece:
            return b"{}"
        line += piece
    return line


def is_in(folder, name):
    try:
        os.stat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def serve(control, work):
    while True:
        ready = select.select([control, work], [], [])[0]
        if work not in ready:
            if not control.recv(64):
                return
            continue
        packet, descriptors = receive(work, 2)
        if not packet:
            return
        request, mount = descriptors
        kind, command, zero, run = HEADER.unpack(packet)
        assert (kind, zero) == (4, 0)
        assert os.get_blocking(request)
        caller = socket.socket(fileno=request)
        order = {"reply": '{"stub": true}'} if command == 1 else json.loads(read_line(caller))
        if "exit" in order:
            os._exit(order["exit"])
        if "stat" in order:
            found = [name for name in order["stat"] if is_in(mount, name)]
            order["reply"] = json.dumps([os.fstatvfs(mount).f_flag, found, command])
        os.close(mount)
        if "reply" in order:
            caller.sendall(order["reply"].encode())
        status = order.get("status", 0)
        if "wait" in order:
            while (packet := control.recv(64)) and packet != HEADER.pack(5, 0, 0, run):
                pass
            if not packet:
                return
            status = order["wait"]
        caller.close()
        if "reports" in order:
            for report in order["reports"]:
                control.send(bytes.fromhex(report.replace("{run}", f"{run:08x}")))
        elif status is not None:
            control.send(REPORT.pack(6, order.get("flags", 0), 0, run, status))


def main():
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(sys.argv[1])
    packet, (work,) = receive(control, 1)
    assert packet == HEADER.pack(1, 0, 0, 0)
    if len(sys.argv) > 2:
        control.send(bytes.fromhex(sys.argv[2]))
        control.recv(64)
        return
    control.send(HEADER.pack(2, 0, 0, 0) + b"{}")
    serve(control, socket.socket(fileno=work))


main()
