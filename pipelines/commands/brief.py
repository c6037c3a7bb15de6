"""Fingerprints and times as tables show them."""

from __future__ import annotations

from datetime import datetime

# How many characters of a fingerprint tables show; every command takes as many.
SHORT = 12


def short(fingerprint: str) -> str:
    return fingerprint[:SHORT]


def moment(written: str) -> str:
    """``2026-11-28 10:40``, in this machine's time zone, of an ISO time."""
    return f"{datetime.fromisoformat(written).astimezone():%Y-%m-%d %H:%M}"
