"""How faithful the simulator is: random call sequences on it and on the real kernel, compared answer by answer.

    python -m tests.fidelity --kernel x86_64-7.2 --sequences 2000 --seed 7

`calls` says what a call, a vocabulary and a stage are; `driver` plays, compares and shrinks and knows no architecture;
`guest` runs inside a lab kernel, or here for this machine's own KVM; `answers` keeps what a kernel said; `x86_64` and
`arm64` are vocabularies.

A vocabulary is added in three steps: (1) a module with a class that has what `calls.Vocabulary` asks for (its calls are
the methods `do_NAME` of its stage, its sequences depend on nothing but the generator and the profile they are given);
(2) a row in `vocabularies.VOCABULARIES`; (3) what can't be compared fairly becomes rows of its `excluded`, each with
its reason, as masks on the answers or as values that are never generated.
"""
