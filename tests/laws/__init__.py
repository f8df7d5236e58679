"""The laws. ``pi^D`` is the next-token distribution while decoding under the cache policy ``D``.

1. Any cut: the same tokens have the same log-probs however they reach the model; scoring a finished sequence gives those of the
   generation that produced it.
2. No eviction, no difference: until the window is full, the bounded cache changes nothing; a fresh adapter never does.
3. Batch invariance: a row depends neither on its neighbours nor on where, or how much, it is padded.
4. Memory is constant: from the first eviction on, the cache holds the same bytes for ever.
5. Evicted tokens act only through ``S``.
6. Gradients: a call in chunks and passes has the gradient of one undivided computation.
7. Order of work does not matter: checkpointing, micro-batches, compilation, kernels.
"""
