"""The caches of a running cluster as tables, for `pd cache`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pd.cost import format_bytes


def print_cache(answer: dict[str, Any], console: Console) -> None:
    """`answer`: of GET /cache."""
    keepers = [each for each in answer["keepers"] if "error" not in each]
    console.print(_tiers(answer["replicas"], keepers))
    for keeper in answer["keepers"]:
        if "error" in keeper:
            console.print(f"{keeper['name']}: {keeper['error']}", markup=False, highlight=False)
    if not answer["keepers"]:
        console.print("no keeper of a host tier is up", highlight=False)
    if any(replica["host_pages_in"] or replica["host_pages_out"] for replica in answer["replicas"]):
        console.print()
        console.print(_copies(answer["replicas"]))
    for keeper in keepers:
        _print_keeper(keeper, console)


def _tiers(replicas: list[dict[str, Any]], keepers: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for name in ("tier", "of", "group"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "page", "free", "cached", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    # A page has the same bytes in every tier.
    page_bytes = [group["page_bytes"] for group in keepers[0]["groups"]] if keepers else []
    rows = [("device", replica["name"], replica["pages"]) for replica in replicas]
    rows += [("host", keeper["name"], keeper["groups"]) for keeper in keepers]
    for tier, name, groups in rows:
        for number, group in enumerate(groups):
            pages = group["free"] + group["cached"] + group["used"]
            size = page_bytes[number] if number < len(page_bytes) else None
            table.add_row(
                "" if number else tier,
                "" if number else name,
                str(number),
                "" if size is None else format_bytes(pages * size),
                "" if size is None else format_bytes(size),
                *(f"{group[state]:,}" for state in ("free", "cached", "used")),
            )
    for keeper in keepers:
        if (storage := keeper["storage"]) is not None:
            known, limit = storage["object_bytes"], storage["limit_bytes"]
            size = "unknown" if known is None else format_bytes(known)
            size = size if limit is None else f"{size} of {format_bytes(limit)}"
            table.add_row("storage", keeper["name"], "", size)
    return table


def _copies(replicas: list[dict[str, Any]]) -> Table:
    table = Table("replica", box=None)
    for name in ("from host", "bytes", "GB/s", "to host", "bytes", "GB/s", "evicted"):
        table.add_column(name, justify="right")
    for replica in replicas:
        cells = []
        for way in ("in", "out"):
            size, seconds = replica[f"host_bytes_{way}"], replica[f"host_seconds_{way}"]
            rate = f"{size / seconds / 1e9:.2f}" if seconds else ""
            cells += [f"{replica[f'host_pages_{way}']:,}", format_bytes(size), rate]
        table.add_row(replica["name"], *cells, f"{replica['pages_evicted']:,}")
    return table


def _print_keeper(keeper: dict[str, Any], console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    console.print(f"\n[bold]{keeper['name']}[/bold]", highlight=False)
    line(
        f"  host     {keeper['found_pages']:,} pages found, {keeper['read_pages']:,} of them read "
        f"from storage; {keeper['offered_pages']:,} offered, {keeper['copied_pages']:,} copied, "
        f"{keeper['refused_pages']:,} refused; {keeper['evicted_pages']:,} evicted"
    )
    storage = keeper["storage"]
    if storage is None:
        line("  storage  none is attached")
    else:
        line(
            f"  storage  {storage['backend']}: wrote {storage['pages_written']:,} pages, "
            f"{format_bytes(storage['bytes_written'])}; read {storage['pages_restored']:,}, "
            f"{format_bytes(storage['bytes_read'])}, of which {storage['pages_used']:,} used and "
            f"{storage['pages_wasted']:,} wasted; {storage['queued_pages']:,} to be written"
        )
        objects = "" if storage["objects"] is None else f"{storage['objects']:,} "
        line(
            f"           {objects}objects: {storage['hit_objects']:,} hit, "
            f"{storage['missed_objects']:,} missed, {storage['corrupt_objects']:,} corrupt, "
            f"{storage['failed_objects']:,} failed"
        )
        if storage["breaker"] != "closed":
            line("           it fails, and is left alone for a while")
    tenants = {name: pages for name, pages in keeper["tenants"].items() if name}
    if tenants:
        quotas = keeper["quotas"]
        texts = (
            f"{name} {pages:,} pages"
            + (f" of {most:,}" if (most := quotas.get(name, quotas.get("*"))) is not None else "")
            for name, pages in tenants.items()
        )
        line(f"  tenants  {', '.join(texts)}")
    if keeper["top_prefixes"]:
        table = Table("  top prefix", "from page", "pages", "matches", "tenant", box=None)
        for top in keeper["top_prefixes"]:
            numbers = (f"{top[name]:,}" for name in ("first_page", "pages", "matches"))
            table.add_row(f"  {top['hash']}", *numbers, top["tenant"])
        console.print(table)
