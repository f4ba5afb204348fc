"""lmpipe keeps the KV cache of LLM inference engines alive outside the engine.

lmpipe.attach(model, "local")            an engine that has an adapter, in one line
lmpipe.Producer(run_dir, layout, …)      any other engine: look up, load, save
"""

from lmpipe.engines import attach, register
from lmpipe.errors import LmpipeError, UnsupportedError
from lmpipe.handles import Tier
from lmpipe.layout import KVLayout
from lmpipe.producer import Found, LoadResult, MappedPages, Producer, SaveTicket

__version__ = "0.1.0"

__all__ = [
    "Found",
    "KVLayout",
    "LmpipeError",
    "LoadResult",
    "MappedPages",
    "Producer",
    "SaveTicket",
    "Tier",
    "UnsupportedError",
    "attach",
    "register",
]
