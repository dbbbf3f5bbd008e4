"""`import demo` for these tests."""

from comfy_host import import_demo

import_demo()
