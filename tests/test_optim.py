"""optim.py: what is refused, which rule a parameter takes, optimizers of groups, their state."""
import math
import re

import pytest
import torch

import optim
import usage

SETTINGS = dict(optimizer='adamw', schedule='cosine', decay=0.2, lr=1e-3, min_lr=0.0,
                weight_decay=0.1, grad_clip=1.0, betas=(0.9, 0.95), ema=0.0,
                groups=[('bias', {'weight_decay': 0.0}), ('.*', {})], init_skip=['^connector'],
                init_from='run', init={}, loss_weights={'a': 2, 'b': 0.0},
                mix={'a': 1.0, 'b': 2.0})


def model():
    """Two blocks, each a matrix and a bias, then a norm and a table that is not learned."""
    torch.manual_seed(0)
    made = torch.nn.Module()
    made.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 4) for _ in range(2))
    made.norm = torch.nn.LayerNorm(4)
    made.head = torch.nn.Linear(4, 2, bias=False)
    made.table = torch.nn.Parameter(torch.zeros(5, 2), requires_grad=False)
    made.scale = torch.nn.Parameter(torch.zeros(()))
    return made


def parameters():
    return dict(model().named_parameters())


# ------------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize('change', [
    {}, {'lr': 0.0}, {'grad_clip': 0.0}, {'ema': 0.999}, {'betas': [0.0, 0.0]}, {'init_skip': []},
    {'groups': [['^a', {'freeze': True, 'lr_scale': 0}], ['.*', {}]]}, {'loss_weights': {}},
    {'optimizer': 'muon', 'schedule': 'wsd', 'decay': 1.0},
], ids=str)
def test_what_may_be(change):
    optim.check(SETTINGS | change)


@pytest.mark.parametrize('key, value, words', [
    ('lr', -1.0, ['lr=-1.0', 'at least 0']),
    ('lr', math.nan, ['lr=nan']),
    ('min_lr', -0.1, ['min_lr=-0.1']),
    ('weight_decay', -0.1, ['weight_decay=-0.1']),
    ('grad_clip', -1.0, ['grad_clip=-1.0']),
    ('betas', (0.9,), ['betas=(0.9,)', 'two']),
    ('betas', (0.9, 1.5), ['betas', ': 1.5', 'below 1']),
    ('betas', (-0.1, 0.9), ['betas', ': -0.1', 'at least 0']),
    ('betas', (0.9, 'x'), ['betas', ": 'x'"]),
    ('optimizer', 'sgd', ["optimizer='sgd'", 'adamw, muon']),
    ('schedule', 'step', ["schedule='step'", 'wsd']),
    ('decay', 0.0, ['decay=0.0', 'above 0']),
    ('decay', 1.5, ['decay=1.5', 'at most 1']),
    ('ema', 1.0, ['ema=1.0', 'below 1']),
    ('ema', -0.1, ['ema=-0.1']),
    ('groups', ['.*'], ['groups', "'.*'", '(regex, {']),
    ('groups', [('.*',)], ['groups', "('.*',)"]),
    ('groups', [('.*', 0.1)], ['groups', "('.*', 0.1)"]),
    ('groups', [('(', {}), ('.*', {})], ['groups', "'('", 'regular expression']),
    ('groups', [(3, {})], ['groups', '3', 'regular expression']),
    ('groups', [('.*', {'lr': 2.0})], ['groups', "'lr'", 'lr_scale']),
    ('groups', [('.*', {'lr_scale': -1.0})], ['groups', "'lr_scale': -1.0", 'at least 0']),
    ('groups', [('.*', {'weight_decay': None})], ['groups', "'weight_decay': None"]),
    ('groups', [('.*', {'freeze': 'false'})], ['groups', "'freeze': 'false'", 'True or False']),
    ('init_skip', ['['], ['init_skip', "'['", 'regular expression']),
    ('loss_weights', {'x': 1.0}, ['loss_weights', "'x'", "['a', 'b']"]),
    ('loss_weights', {'a': -1.0}, ['loss_weights', "'a': -1.0", 'at least 0']),
    ('loss_weights', {'a': 'much'}, ['loss_weights', "'a': 'much'"]),
    ('loss_weights', {'a': 0, 'b': 0.0}, ["loss_weights={'a': 0, 'b': 0.0}", 'nothing']),
    ('init_from', '', ['init_skip', "'^connector'", 'no init_from or init']),
], ids=str)
def test_one_fault_is_named(key, value, words):
    with pytest.raises(ValueError) as error:
        optim.check(SETTINGS | {key: value})
    message = str(error.value)
    assert all(word in message for word in words) and '\n' not in message, message
    assert set(re.findall(r'(\w+)=', message)) <= {key, 'mix'}, message


def test_what_changes_nothing_is_said():
    assert optim.check(SETTINGS) == []
    lines = optim.check(SETTINGS | dict(lr=0.0, decay=0.5, min_lr=0.1, schedule='constant'))
    assert [line.split('=')[0] for line in lines] == ['lr', 'decay', 'min_lr']
    assert optim.check(SETTINGS | dict(decay=0.5, min_lr=0.1, schedule='wsd')) == []


# ------------------------------------------------------------------------------------------------
# rules


def test_the_first_rule_found_in_a_name_counts():
    groups = [('^blocks.0', {'lr_scale': 0.5}), ('bias', {'weight_decay': 0.0}), ('.*', {})]
    options = optim.match(groups, ['blocks.0.bias', 'blocks.1.bias', 'head.weight'])
    assert options == {'blocks.0.bias': {'lr_scale': 0.5}, 'blocks.1.bias': {'weight_decay': 0.0},
                       'head.weight': {}}


@pytest.mark.parametrize('groups, words', [
    ([('^blocks', {})], ['no rule matches', 'table', '.*']),
    ([('.*', {}), ('^blocks', {'lr_scale': 2.0})], ["'^blocks'", 'no parameter', 'earlier']),
    ([('vit', {}), ('.*', {})], ["'vit'", 'no parameter']),
    ([('.*', {'freeze': True})], ['freeze', 'nothing is left']),
    ([('.*', {'lr': 1.0})], ["'lr'", 'lr_scale']),
], ids=str)
def test_rules_that_do_not_fit_the_model(groups, words):
    for use in (optim.match, usage.describe):
        with pytest.raises(ValueError) as error:
            use(groups, parameters())
        assert all(word in str(error.value) for word in words), error.value


def test_a_line_for_each_parameter_in_columns():
    groups = [('^blocks.0', {'freeze': True}), ('bias', {'weight_decay': 0.0, 'lr_scale': 2}),
              ('.*', {})]
    lines = usage.describe(groups, parameters())
    assert [line.split()[0] for line in lines] == list(parameters())

    told = {}
    for line in lines:
        name, *cells = re.split('  +', line)
        told[name] = cells
    assert told['blocks.0.bias'] == ['4', "'^blocks.0'", 'freeze=True', 'frozen']
    assert told['blocks.1.weight'] == ['4 x 3', "'.*'", '-', 'trained']
    assert told['blocks.1.bias'] == ['4', "'bias'", 'weight_decay=0.0, lr_scale=2', 'trained']
    assert told['table'] == ['5 x 2', "'.*'", '-', 'frozen']       # of the model's own accord
    assert told['scale'] == ['scalar', "'.*'", '-', 'trained']

    # Whatever the widths, a column begins at the same place in every line.
    begins = set()
    for line in lines:
        begins.add(tuple(cell.start() for cell in re.finditer(r'^\S|(?<=  )\S', line)))
    assert len(begins) == 1, lines


# ------------------------------------------------------------------------------------------------
# optimizers


def trained_of(made):
    return {name: p for name, p in made.named_parameters() if p.requires_grad}


def test_groups_hold_each_parameter_once_with_its_options():
    trained = trained_of(model())
    rules = [('^head', {'lr_scale': 0.5}), ('bias', {'weight_decay': 0.0}), ('.*', {})]
    options = optim.match(rules, trained)
    adamw, = optim.build('adamw', trained, options, 1e-3, (0.9, 0.95), 0.1)
    assert isinstance(adamw, torch.optim.AdamW)

    names = {p: name for name, p in trained.items()}
    held = {}
    for group in adamw.param_groups:
        for p in group['params']:
            held[names[p]] = group['lr_scale'], group['weight_decay']
    assert sum(len(group['params']) for group in adamw.param_groups) == len(trained) == len(held)
    assert held['head.weight'] == (0.5, 0.1) and held['norm.bias'] == (1.0, 0.0)
    assert held['blocks.1.weight'] == held['norm.weight'] == held['scale'] == (1.0, 0.1)


def test_muon_takes_the_matrices_of_blocks_and_nothing_else():
    trained = trained_of(model())
    options = optim.match([('.*', {})], trained)
    adamw, muon = optim.build('muon', trained, options, 1e-3, (0.9, 0.95), 0.1)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    matrices = [p for group in muon.param_groups for p in group['params']]
    assert {id(p) for p in matrices} == {id(trained[f'blocks.{i}.weight']) for i in range(2)}

    # None without parameters: torch would refuse it.
    alone = {'blocks.0.weight': trained['blocks.0.weight']}
    assert len(optim.build('muon', alone, options, 1e-3, (0.9, 0.95), 0.1)) == 1


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_zeros_stand_for_no_step(kind):
    """A step from the zeros of state_tensors is the step of an optimizer that has no state."""
    def step(reads_state):
        trained = trained_of(model())
        options = optim.match([('.*', {})], trained)
        optimizers = optim.build(kind, trained, options, 1e-3, (0.9, 0.95), 0.1)
        if reads_state:
            zeros = optim.state_tensors(optimizers, trained)
            assert not any(tensor.any() for tensor in zeros.values())
        for number, p in enumerate(trained.values()):
            p.grad = torch.full_like(p, 0.1 * (number + 1))
        for optimizer in optimizers:
            optimizer.step()
        return trained, optim.state_tensors(optimizers, trained)

    weights, state = step(reads_state=False)
    same_weights, same_state = step(reads_state=True)
    assert state.keys() == same_state.keys() and any(tensor.any() for tensor in state.values())
    for a, b in [(weights, same_weights), (state, same_state)]:
        assert all(torch.equal(a[name], b[name]) for name in a)
