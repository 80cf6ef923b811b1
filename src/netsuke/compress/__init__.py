"""Methods that shrink a model, one file each, and the verb that applies them singly: `netsuke compress`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from netsuke.verb import verb


@verb
def compress(
    model: str, methods: list[Any], *, out: str, data: str | None = None, context: int | None = None,
    vocab: int | None = None, rule: str = "closed",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Applies methods in order and writes an artifact.

    methods  Method values, their JSON dictionaries, or texts such as "quantize:bits=4,group=32"
    vocab    in place of methods: keep the pieces of the tokenizer that `data` uses most, so many, by `rule`
             (models/tokenizer_trim.py); rows of the tables go, nothing is retrained

    Returns {model, methods, bytes_before, bytes_after, traffic_before, traffic_after, metric, before, after, artifact}; quality
    is on validation text, every token but the first decoded as input-sparse maps decode it; traffic is bytes of the
    blocks' tensors that a decoded token reads.
    With `vocab` it is {pieces, coverage, unreachable, bits_per_byte (before and after), bytes, artifact}: perplexities under two
    tokenizers do not compare. Raises NetsukeError for unusable input; nothing is written then.
    """
    if vocab is not None:
        from netsuke.errors import NetsukeError
        from netsuke.train.here import trim_vocabulary

        if methods or data is None:
            raise NetsukeError(
                f"trim the vocabulary of {model}", "methods beside it" if methods else "no text to count pieces in",
                "--vocab and --data, and no method", "compress the trimmed artifact afterwards",
            )  # fmt: skip
        return trim_vocabulary(model, data, vocab, out, rule=rule, context=context)
    import torch

    from netsuke import __version__
    from netsuke.compress.method import Method, from_json, parse
    from netsuke.compress.sparse_channels import decoding, total, traffic
    from netsuke.models.artifact import check_writable
    from netsuke.models.load import describe, load
    from netsuke.models.save import save_artifact
    from netsuke.tasks.language import language_task

    tell, target = on_progress or (lambda *_: None), check_writable(Path(out))
    values = [m if isinstance(m, Method) else parse(m) if isinstance(m, str) else from_json(m) for m in methods]
    tell("reading", 0, 0)
    before, loaded = describe(model), load(model)
    task = language_task(loaded, data, context)
    with torch.no_grad():
        tell("measuring the model as it is", 0, 0)
        quality, carved = task.score(loaded.model, "validation"), loaded.model
        for i, value in enumerate(values):
            tell(f"applying {value.name}", i, len(values))
            carved = value.apply(carved, task)
        tell("measuring what it became", 0, 0)
        with decoding(carved):
            after = task.score(carved, "validation")
    provenance = {"base": Path(model).name, "methods": [v.to_json() for v in values], "netsuke": __version__}
    trained_on = (loaded.manifest or {}).get("provenance", {}).get("data")
    if trained_on:
        provenance["data"] = trained_on
    read = {"before": round(total(traffic(loaded.model)).bytes_read), "after": round(total(traffic(carved)).bytes_read)}
    facts = {
        "perplexity_validation": after,
        "perplexity_validation_before": quality,
        "bytes_read_per_token": read["after"],
    }
    save_artifact(target, carved, loaded.tokenizer, provenance=provenance, facts=facts, budget=None)
    return {
        "model": model, "methods": provenance["methods"], "bytes_before": before.bytes_on_disk,
        "bytes_after": sum(f.stat().st_size for f in target.iterdir()), "metric": task.metric,
        "traffic_before": read["before"], "traffic_after": read["after"],
        "before": quality, "after": after, "artifact": str(target),
    }  # fmt: skip
