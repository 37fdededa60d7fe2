"""Orchestration: spec, engine, leader, router, nodes, API and command line."""

__version__ = "0.1.0"
