"""What fastcl does, shown on this machine: ``python -m examples.demo``.

First the proof (:mod:`~examples.demo.table`), then a batch that has no dense loss (:mod:`~examples.demo.large`), then a
training on real images (:mod:`~examples.demo.digits`), then one picture of it all (:mod:`~examples.demo.picture`).
"""
