"""Models in the format of transformers: `export` writes, `pretrained` reads, `architectures` and `tensors` translate.

Only `transformers` needs the library of that name.
"""
