"""Hosts with addresses of their own on one machine: network namespaces, joined by a virtual link."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PORT = 29400


class Host:
    """A network namespace."""

    def __init__(self, name: str, interface: str, address: str):
        self.name, self.interface, self.address = name, interface, address

    def command(self, start: list[str]) -> list[str]:
        """`start`, as it is run on this host; gloo and torchrun are told its address, as its name is not resolved."""
        return ["ip", "netns", "exec", self.name, "env", f"GLOO_SOCKET_IFNAME={self.interface}", *start]

    def kill(self) -> None:
        """End all its processes at once, as a power cut does."""
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", "-KILL", pid], capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces with a link between them, gone afterwards; skips the test where they are not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts are network namespaces, and there is no iproute2 here to make them")
    tag = f"{os.getpid() % 100000:05d}"
    hosts = Host(f"lr-a-{tag}", f"lra{tag}", "10.77.0.1"), Host(f"lr-b-{tag}", f"lrb{tag}", "10.77.0.2")
    a, b = hosts
    commands = [
        f"netns add {a.name}",
        f"netns add {b.name}",
        f"link add {a.interface} netns {a.name} type veth peer name {b.interface} netns {b.name}",
        *(f"-n {host.name} addr add {host.address}/24 dev {host.interface}" for host in hosts),
        *(f"-n {host.name} link set {interface} up" for host in hosts for interface in ("lo", host.interface)),
    ]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {command}: {done.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            time.sleep(0.1)
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
