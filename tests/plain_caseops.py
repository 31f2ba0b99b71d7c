"""Text to ids and byte counts as the record lineage does it: plain, a document at a time."""

import lossless_caps as caps


def plain_transform(text):
    """The case transform from its definition, a word at a time."""
    out, i = [], 0
    while i < len(text):
        if text[i] in caps.OPERATORS:
            out.append(caps.ESC)
        if not (text[i].isascii() and text[i].isalpha()):
            out.append(text[i])
            i += 1
            continue
        j = i
        while j < len(text) and text[j].isascii() and text[j].isalpha():
            j += 1
        word, i = text[i:j], j
        if word.islower():
            out.append(word)
        elif len(word) > 1 and word.isupper():
            out.append(caps.ALLCAPS + word.lower())
        else:
            signs = [caps.CAPNEXT if c.isupper() else "" for c in word]
            signs[0] = caps.TITLE if word[0].isupper() else ""
            out.extend(sign + c.lower() for sign, c in zip(signs, word, strict=True))
    return "".join(out)


def plain_ids(sp, text):
    """[ids] of one document."""
    return sp.encode(plain_transform(text))


def plain_counts(sp, text):
    """[original bytes of each token] of one document: SentencePiece's surfaces, one by one."""
    transformed = plain_transform(text)
    machine = caps._Machine()  # not surface_byte_counts: the pieces may miss the text's end
    return [sum(len(machine.feed(x).encode()) for x in transformed[a:b])
            for a, b in sp.encode_as_offset_mapping(transformed)["offsets"]]


def plain_encoded(sp, texts):
    """[(ids, counts)] of documents."""
    return [(plain_ids(sp, text), plain_counts(sp, text)) for text in texts]
