# %% 1 · the loss of the kind alone
answer_1 = math.log(48)
# %% 1 · bits instead of nats
answer_1 = math.log2(48) / 8
# %% 1 · the base of the decimal logarithm
answer_1 = math.log10(48) / 8
# %% 1 · everything can be known
answer_1 = 0.0
# %% 1 · each of the eight tokens guessed among 48
answer_1 = 8 * math.log(48)
# %% 1 · the kind's token left out of the count
answer_1 = math.log(48) / 7
# %% 1 · a probability instead of a loss
answer_1 = 1 / 48
# %% 1 · given as text
answer_1 = "0.5"


# %% 2 · never clears the gradients
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% 2 · clears the gradients between backward and step
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% 2 · never looks at the schedule
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% 2 · sets the rate after the step
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate_at(step)
        losses.append(loss.item())
    return losses


# %% 2 · sets the rate once, before the loop
def my_train(model, optimizer, batches, rate_at):
    optimizer.param_groups[0]["lr"] = rate_at(0)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% 2 · counts steps from 1
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% 2 · returns tensors
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


# %% 2 · the losses after the steps
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(model(**batch).loss.item())
    return losses


# %% 2 · sets an attribute that no optimizer reads
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        optimizer.lr = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% 2 · forgets to return
def my_train(model, optimizer, batches, rate_at):
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# %% 3 · the mean over all labels, as before
def example_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% 3 · no shift
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


# %% 3 · shifted twice
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-2].transpose(1, 2), labels[:, 2:], reduction="none"
    )
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


# %% 3 · divides by the positions
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return losses.mean(1).mean()


# %% 3 · the sum over the examples
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).sum()


# %% 3 · one loss for each example
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


# %% 3 · a plain number
def example_loss(logits, labels):
    return sum(loss_loop(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))) / len(
        labels
    )


# %% 3 · no gradient
def example_loss(logits, labels):
    rows = [loss_loop(logits[i : i + 1].detach(), labels[i : i + 1]) for i in range(len(labels))]
    return torch.tensor(rows).mean()


# %% 3 · shifts the other way
def example_loss(logits, labels):
    losses = nn.functional.cross_entropy(
        logits[:, 1:].transpose(1, 2), labels[:, :-1], reduction="none"
    )
    return (losses.sum(1) / (labels[:, :-1] != -100).sum(1)).mean()


# %% 2 · one step for all batches
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return losses


# %% 2 · forgets the backward pass
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        losses.append(model(**batch).loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# %% 2 · multiplies the rates
def my_train(model, optimizer, batches, rate_at):
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] *= rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% 3 · skips the first label of each answer
def example_loss(logits, labels):
    losses = []
    for row, truth in zip(logits, labels):
        at = (truth != -100).nonzero()[1:, 0]
        losses.append(nn.functional.cross_entropy(row[at - 1], truth[at]))
    return torch.stack(losses).mean()
