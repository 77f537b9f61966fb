# %% 1 · all 80 GB taken as free
answer_1 = 6
# %% 1 · weights only
answer_1 = 2
# %% 1 · weights and gradients only
answer_1 = 4
# %% 1 · rounded down
answer_1 = 7
# %% 1 · one more, to be safe
answer_1 = 9
# %% 1 · every GPU holds everything
answer_1 = 1
# %% 1 · a fraction of a GPU
answer_1 = 7.4
# %% 1 · the next power of two after the right one
answer_1 = 16


# %% 2 · sums without sending
def ring_all_reduce(numbers, exchange):
    sums = [sum(column) for column in zip(*numbers)]
    return [list(sums) for _ in numbers]


# %% 2 · every list goes round once, number by number
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    visiting = [list(row) for row in numbers]
    for _ in range(n - 1):
        columns = [exchange([row[i] for row in visiting]) for i in range(n)]
        visiting = [list(row) for row in zip(*columns)]
        numbers = [[a + b for a, b in zip(*rows)] for rows in zip(numbers, visiting)]
    return numbers


# %% 2 · stops when the sums are made
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(n - 1):
        arrived = exchange([numbers[p][(p - turn) % n] for p in range(n)])
        for p, value in enumerate(arrived):
            numbers[p][(p - 1 - turn) % n] += value
    return numbers


# %% 2 · adds in the second half, too
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        arrived = exchange([numbers[p][(p - turn) % n] for p in range(n)])
        for p, value in enumerate(arrived):
            numbers[p][(p - 1 - turn) % n] += value
    return numbers


# %% 2 · puts what arrives at the sender's next place
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        arrived = exchange([numbers[p][(p - turn) % n] for p in range(n)])
        for p, value in enumerate(arrived):
            at = (p - turn) % n
            numbers[p][at] = value + (numbers[p][at] if turn < n - 1 else 0)
    return numbers


# %% 2 · always sends its own first piece
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        arrived = exchange([numbers[p][p] for p in range(n)])
        for p, value in enumerate(arrived):
            at = (p - 1) % n
            numbers[p][at] = value + (numbers[p][at] if turn < n - 1 else 0)
    return numbers


# %% 2 · sends whole lists
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    visiting = numbers
    for _ in range(n - 1):
        visiting = exchange(visiting)
        numbers = [[a + b for a, b in zip(*rows)] for rows in zip(numbers, visiting)]
    return numbers


# %% 2 · returns nothing
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        exchange([numbers[p][(p - turn) % n] for p in range(n)])


# %% 2 · the mean instead of the sum
def ring_all_reduce(numbers, exchange):
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        arrived = exchange([numbers[p][(p - turn) % n] for p in range(n)])
        for p, value in enumerate(arrived):
            at = (p - 1 - turn) % n
            numbers[p][at] = value + (numbers[p][at] if turn < n - 1 else 0)
    return [[value / n for value in row] for row in numbers]


# %% 3 · the mean of the parts
def factor(counts, me, i):
    return 1 / len(counts[me])


# %% 3 · nothing to weigh
def factor(counts, me, i):
    return 1.0


# %% 3 · the share of the process's own labels
def factor(counts, me, i):
    return counts[me][i] / sum(counts[me])


# %% 3 · the share of all labels, forgetting DDP's mean
def factor(counts, me, i):
    return counts[me][i] / sum(map(sum, counts))


# %% 3 · the number of labels
def factor(counts, me, i):
    return counts[me][i]


# %% 3 · the number of parts instead of processes
def factor(counts, me, i):
    return counts[me][i] * len(counts[me]) / sum(map(sum, counts))


# %% 3 · divided by the processes once more
def factor(counts, me, i):
    return counts[me][i] / sum(map(sum, counts)) / len(counts)


# %% 3 · the process's weight only
def factor(counts, me, i):
    return sum(counts[me]) * len(counts) / sum(map(sum, counts))
