"""A network of its own for some processes of a test: network namespaces, joined by bridges of the kernel.

Each member has an address on one of several switches, and each switch a cable to the core. A cable can be pulled
(nobody is told, bytes are simply lost) and plugged in again, and delayed where the kernel can do that. All of it is
gone when the processes that hold the namespaces are: nothing is left behind on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

CORE = "core"  # the switch that joins the others


def why_not() -> str:
    """Why this machine allows no such network; empty if it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]:
        return f"there is no {missing[0]}"
    bridge = ["unshare", "-n", "ip", "link", "add", "probe", "type", "bridge"]
    refused = subprocess.run(bridge, check=False, capture_output=True, text=True)
    return f"no bridge can be made: {refused.stderr.strip()}" if refused.returncode else ""


def why_no_delay() -> str:
    """Why this machine cannot delay what a cable carries; empty if it can."""
    netem = ["unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if shutil.which("tc") is None:
        return "there is no tc"
    refused = subprocess.run(netem, check=False, capture_output=True, text=True)
    return f"tc netem: {refused.stderr.strip()}" if refused.returncode else ""


@dataclass
class Lan:
    """Who is on it, where, and how to get in."""

    switches: int  # process that holds the namespace of the switches
    holders: dict[str, int]  # member → process that holds its namespace

    def address(self, member: str) -> str:
        return f"10.77.0.{1 + list(self.holders).index(member)}"

    def within(self, member: str) -> list[str]:
        """The words before a command that is to run where this member is."""
        return inside(self.holders[member])

    def pull(self, cable: str) -> None:
        """`cable`: a member's own, or that of a switch (its number) to the core."""
        ip(self.switches, "link", "set", f"to-{cable}", "down")

    def plug(self, cable: str) -> None:
        ip(self.switches, "link", "set", f"to-{cable}", "up")

    def delay(self, cable: str, milliseconds: int) -> None:
        words = ["tc", "qdisc", "add", "dev", f"to-{cable}", "root", "netem", "delay", f"{milliseconds}ms"]
        subprocess.run([*inside(self.switches), *words], check=True)


def inside(holder: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder}/ns/net"]


def ip(holder: int, *words: str) -> None:
    subprocess.run([*inside(holder), "ip", *words], check=True)


@contextmanager
def held() -> Iterator[int]:
    """A new network namespace, as long as the block lasts: the process that holds it."""
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo && cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        holder.stdout.readline()  # it is there
        yield holder.pid
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


@contextmanager
def lan(*sides: Sequence[str]) -> Iterator[Lan]:
    """A switch for the members of each side, and one that joins these."""
    with ExitStack() as stack:
        switches = stack.enter_context(held())
        made = Lan(switches, {member: stack.enter_context(held()) for side in sides for member in side})
        ip(switches, "link", "add", CORE, "type", "bridge")
        ip(switches, "link", "set", CORE, "up")
        for number, side in enumerate(sides):
            switch = f"switch-{number}"
            ip(switches, "link", "add", switch, "type", "bridge")
            ip(switches, "link", "add", f"to-{number}", "type", "veth", "peer", "name", f"up-{number}")
            ip(switches, "link", "set", f"to-{number}", "master", CORE)
            ip(switches, "link", "set", f"up-{number}", "master", switch)
            for device in (switch, f"to-{number}", f"up-{number}"):
                ip(switches, "link", "set", device, "up")
            for member in side:
                holder = made.holders[member]
                ip(
                    switches,
                    "link",
                    "add",
                    f"to-{member}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    str(holder),
                )
                ip(switches, "link", "set", f"to-{member}", "master", switch, "up")
                ip(holder, "link", "set", "lo", "up")
                ip(holder, "address", "add", f"{made.address(member)}/24", "dev", "eth0")
                ip(holder, "link", "set", "eth0", "up")
        yield made
