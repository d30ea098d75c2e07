"""Routing on any module: gates, and the leaves that mix their weights per input."""
