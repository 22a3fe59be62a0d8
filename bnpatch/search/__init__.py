"""The search for weights, and what unseen images say of them, in seven concepts.

1. *Patch weights* (``core/patch.py``): alpha, lambda, slope and offset of each norm layer. A search looks for
   these.
2. *Objective* (``objective``, ``label_free``): scores a model on examples, with labels or without, and gives
   the loss to learn by.
3. *Score cache* (``score_cache``): scores the same weights on the same examples only once.
4. *Global search* (``global_search``): one weight for all norm layers. ``halving`` decides the next step from
   the ``trials`` so far; ``studies`` keeps these with Optuna, in one of the ``storages``.
5. *Layer search* (``layer_search``): a weight per norm layer or stage, by ``gradient_search`` or, for ONNX
   files that can't be converted to torch, by ``coordinate_search``.
6. *Candidates and selection*: ``candidates`` lists what is tried; ``selection`` chooses by examples that the
   weights were not learned from, within a ``latency_limit`` and without harm to the images to ``keep``. Where
   answers are too coarse, a cross-entropy guides it, whatever the ``temperature`` of the logits.
7. *Held-out evaluation* (``held_out``): what the choice does on examples that had no say in it; without
   labels, whatever the ``class_shares``. Where images are few, parts of them take turns in being held out
   (``cross_fit``).

``tune`` is the public verb: it makes a ``task`` of the user's data and ``config``, and returns a ``result``
with ``thumbnails`` of some images. ``progress`` counts what is done; ``distributed`` shares it between
processes.
"""
