"""GPUs, in two parts that do not know each other. Knows no stage, no tier and no engine.

Kernels, in an engine's process: Triton reads an engine's pages and writes encoded chunks, and back. One file per codec,
encode and decode side by side; the bytes are those of `lmpipe.codecs`; `paging` moves raw pages. Kernels run on torch's
current stream, and nothing waits for them; `pool` makes transfers of them, on the streams of `transfers`; `engine` is a
pool as a producer knows it, over an `arena` that is pinned.

Copies, in the process of gather: `runtime` says what is asked of CUDA, `ipc` exports and opens pages, `pinned` pins the
arena, `copy` plans, `readers` is what gather is given. Only `cupy_runtime` imports CuPy, and only the launcher of a
topology that names a GPU imports that.
"""
