# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""`online.emit` in Triton: one program writes the codes of one list, its item and its tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries", "room", "text"])
def emit_item(
    starts, wholes, fulls, counts, index, query_codes, query_lengths, key_codes, key_lengths,
    slots, owners, codes, metas, items, work, heads, blocks, first_video, video,
    list_samples, list_heads, copies, entries, room, stride_q_len, stride_k_len, text,
    TOGETHER: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % blocks
    line = pid // blocks
    head = line % heads
    sample = line // heads
    lists = (sample % list_samples * list_heads + head % list_heads) * blocks
    row = lists + block
    places = tl.arange(0, BLOCK)
    start = tl.load(starts + row)
    full = tl.load(fulls + row)
    count = tl.load(counts + row)
    # An empty list is one tile of nothing, which all of them share.
    tiles = tl.maximum((count + TOGETHER - 1) // TOGETHER, 1)
    begin = tl.where(count > 0, start * TOGETHER, entries) + sample % copies * room
    # Who comes first in a list's place writes it; those who share it all know what is there.
    if (head < list_heads) & (sample < tl.maximum(list_samples, copies)):
        lengths = key_lengths + sample * stride_k_len
        for first in range(0, tiles * TOGETHER, BLOCK):
            place = first + places  # [BLOCK]
            listed = place < count
            key = tl.load(index + start + place, mask=listed, other=0)
            code = tl.load(key_codes + key, mask=listed, other=-1)
            meta = tl.load(lengths + key, mask=listed, other=0)
            meta += tl.where(listed & (place >= full), 256, 0)  # lists.PARTIAL
            inside = place < tiles * TOGETHER
            tl.store(codes + begin + place, code, mask=inside)
            tl.store(metas + begin + place, meta, mask=inside)

    # Which item this is: text rows, then head by head the rows of video, longest first.
    number = line * (blocks - video) + tl.where(block < first_video, block, block - video)
    if (block >= first_video) & (block < first_video + video):
        own = block - first_video
        rank = own
        if not EVEN:
            rank = 0
            for first in range(0, video, BLOCK):
                other = first + places
                inside = other < video
                theirs = tl.load(counts + lists + first_video + other, mask=inside, other=-1)
                ahead = (theirs > count) | ((theirs == count) & (other < own))
                rank += tl.sum((ahead & inside).to(tl.int32), 0)
        number = text + line * video + rank
    item = items + tl.load(slots + number) * 8
    tl.store(item, sample)
    tl.store(item + 1, head)
    tl.store(item + 2, begin)
    tl.store(item + 3, tl.load(query_codes + block))
    tl.store(item + 4, tl.load(query_lengths + sample * stride_q_len + block))
    tl.store(item + 5, tiles)
    tl.store(item + 6, tl.load(wholes + row) // TOGETHER)
    tl.store(item + 7, row)
    tl.atomic_add(work + tl.load(owners + number) * 2 + 1, tiles, sem="relaxed")
