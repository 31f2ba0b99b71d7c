"""CaseOps data: documents in (`sources`), token ids and byte counts (`encoder`), shard files out
(`shards`). prepare_caseops_data.py is the command; train_gpt.py needs none of it."""

BOS = 1  # the id that begins every document
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space inside pieces
COUNT_LIMIT = 1 << 16  # token ids and byte counts are uint16


class UserError(Exception):
    """What a user can cause and mend, said in one line."""
