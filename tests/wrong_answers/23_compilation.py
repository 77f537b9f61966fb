# %% 1 · each length is compiled
compiled_times = (3, 2, 2)
# %% 1 · every change of the batch is compiled
compiled_times = (1, 3, 2)
# %% 1 · the new tokens don't count for the room
compiled_times = (1, 2, 1)
# %% 1 · one for all, always
compiled_times = (1, 1, 1)
# %% 1 · counts the answers
compiled_times = (3, 3, 2)
# %% 1 · a number
compiled_times = 5


# %% 2 · cuts out what is filled
def attend_in_room(q, k, v, keys, values, visible, slot):
    n = int(slot) + 1
    keys[n - 1], values[n - 1], visible[n - 1] = k[0], v[0], True
    scores = (q @ keys[:n].T) / keys.shape[1] ** 0.5
    return scores.softmax(-1) @ values[:n]


# %% 2 · no mask
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    return ((q @ keys.T) / keys.shape[1] ** 0.5).softmax(-1) @ values


# %% 2 · hides with zero
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    return ((q @ keys.T) / keys.shape[1] ** 0.5).masked_fill(~visible, 0).softmax(-1) @ values


# %% 2 · hides after the softmax
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    return ((q @ keys.T) / keys.shape[1] ** 0.5).softmax(-1).masked_fill(~visible, 0) @ values


# %% 2 · no scale
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    return (q @ keys.T).masked_fill(~visible, float("-inf")).softmax(-1) @ values


# %% 2 · doesn't see itself
def attend_in_room(q, k, v, keys, values, visible, slot):
    scores = (q @ keys.T / keys.shape[1] ** 0.5).masked_fill(~visible, float("-inf"))
    out = scores.softmax(-1) @ values
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    return out


# %% 2 · forgets to make the slot visible
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)
    values.index_copy_(0, slot, v)
    scores = (q @ keys.T / keys.shape[1] ** 0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ values


# %% 2 · works on copies
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys, values = keys.index_copy(0, slot, k), values.index_copy(0, slot, v)
    visible.index_fill_(0, slot, True)
    scores = (q @ keys.T / keys.shape[1] ** 0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ values


# %% 3 · asks
def finish(token, done, eos):
    if bool((token == eos).any()):
        return token.masked_fill(done, 0), done | (token == eos)
    return token.masked_fill(done, 0), done


# %% 3 · writes 0 for eos too
def finish(token, done, eos):
    done = done | (token == eos)
    return token.masked_fill(done, 0), done


# %% 3 · forgets who had ended
def finish(token, done, eos):
    return token.masked_fill(done, 0), token == eos


# %% 3 · an ended row goes on writing
def finish(token, done, eos):
    return token, done | (token == eos)


# %% 3 · ends a row that writes 0 only
def finish(token, done, eos):
    token = token.masked_fill(done, 0)
    return token, token == 0


# %% 3 · changes its inputs
def finish(token, done, eos):
    token.masked_fill_(done, 0)
    done |= token == eos
    return token, done


# %% 3 · row by row, as before
def finish(token, done, eos):
    return finish_slowly(token, done, eos)
