"""Names that a run and its libraries call, such as `os.rename` and `open`: code of the user's own may set them to
something else, or to nothing, and afterwards they are as they were."""

from __future__ import annotations

import builtins
import copy
import hashlib
import importlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy
import torch

MODULES = (
    builtins, os, os.path, io, json, math, re, copy, hashlib, importlib, pathlib, shutil, signal, sys, threading, time,
    numpy, torch, torch.nn.functional,
)  # fmt: skip
CLASSES = (pathlib.PurePath, pathlib.Path, pathlib.PosixPath)
LOADED = sys.modules
MISSING = object()


class Names(NamedTuple):
    """What the names stand for."""

    modules: list[dict[str, Any]]  # of each module
    methods: list[dict[str, Any]]  # of each class
    loaded: dict[str, Any]  # modules


def names() -> Names:
    """As they are now."""
    return Names([dict(each.__dict__) for each in MODULES], [dict(each.__dict__) for each in CLASSES], dict(LOADED))


def put_back(before: Names) -> None:
    """As they were: functions and classes, values in whose place stands one of another type, and loaded modules: of
    one that was loaded a second time, the first is what the run calls. Names that are new stay."""
    builtins.__dict__.update(before.modules[0])  # first: what follows calls them
    for module, known in zip(MODULES, before.modules, strict=True):
        now = module.__dict__
        if _changed(now, known):
            now.update({name: value for name, value in known.items() if _lost(now, name, value)})
    for kind, methods in zip(CLASSES, before.methods, strict=True):
        for name, value in methods.items():
            if kind.__dict__.get(name, MISSING) is not value:
                setattr(kind, name, value)
    if _changed(LOADED, before.loaded):
        LOADED.update(before.loaded)


def _changed(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """By what they are: an object of the user's own may say that it equals another."""
    return len(now) != len(before) or any(now.get(name, MISSING) is not value for name, value in before.items())


def _lost(now: dict[str, Any], name: str, value: Any) -> bool:
    return callable(value) or (value is not None and type(now.get(name, MISSING)) is not type(value))
