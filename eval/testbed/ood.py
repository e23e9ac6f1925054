"""A hundred ordinary requests that none of the testbed's experts serves: the base model should answer them."""

from __future__ import annotations

OOD: tuple[str, ...] = tuple(
    line.strip()
    for line in """
    Hi there!
    Hello, how are you today?
    Good morning
    Who are you?
    What can you do?
    Tell me a joke
    Tell me a story about a brave knight
    What should I cook for dinner tonight?
    How do I bake sourdough bread?
    Give me a recipe for tomato soup
    Why is the sky blue?
    How far away is the moon?
    What causes earthquakes?
    Explain how vaccines work
    How do aeroplanes stay in the air?
    What is photosynthesis?
    How does a refrigerator work?
    Who painted the Mona Lisa?
    Who wrote Hamlet?
    When did the Second World War end?
    Who was the first person on the moon?
    Why did the Roman Empire fall?
    What happened in the French Revolution?
    What is the meaning of life?
    Is there life on other planets?
    Recommend a good book
    Which film should I watch this weekend?
    What kind of music do you like?
    Write a poem about autumn
    Write a haiku about the sea
    Write a birthday message for my grandmother
    Draft an email asking my boss for a day off
    Help me write a cover letter for a job as a nurse
    How can I prepare for a job interview?
    How do I ask for a pay rise?
    How can I save more money?
    Should I buy or rent a flat?
    What is compound interest?
    How do I file my taxes?
    What is inflation?
    How do I start a small business?
    What is a good way to learn the guitar?
    How long does it take to learn Spanish?
    How can I improve my memory?
    How do I stop procrastinating?
    I feel tired all the time, what can I do?
    My back hurts after sitting all day
    What helps against a cold?
    How many hours should I sleep?
    Is coffee bad for the heart?
    What are the symptoms of the flu?
    How do I start running?
    What is a healthy breakfast?
    Can you suggest a workout for beginners?
    How do I train my puppy not to bite?
    Why do cats purr?
    What do hedgehogs eat?
    How long do elephants live?
    How do bees make honey?
    How do I grow tomatoes on a balcony?
    When should I prune roses?
    My plant has yellow leaves, why?
    How do I remove a wine stain from a carpet?
    How do I fix a dripping tap?
    My laptop does not turn on any more
    How do I reset my password?
    Why is my internet so slow?
    Which phone should I buy?
    What is the difference between RAM and a hard disk?
    Explain recursion to a beginner
    Write a Python function that computes prime numbers
    What is a neural network?
    How does a blockchain work?
    Fix this bug: my loop never stops
    What is the difference between SQL and NoSQL?
    How do I install Linux?
    What will the weather be like tomorrow?
    What time is it?
    Play some relaxing music
    Set a timer for ten minutes
    Turn off the lights in the kitchen
    Remind me to call my mother on Sunday
    Book a table for four at an Italian restaurant
    Find me a cheap flight to the seaside
    What should I see in a weekend in the mountains?
    How do I pack for a two week trip?
    Do I need a visa to travel abroad?
    What is the best season to go hiking?
    How do you play poker?
    What are the rules of offside in football?
    Who won the last world cup?
    Suggest a game for a children's party
    What present could I give my father?
    How do I make friends in a new town?
    My neighbour is too noisy, what should I do?
    How do I apologise to a friend?
    Summarise the plot of a famous fairy tale
    Explain the theory of relativity in simple terms
    Solve the equation with x squared on both sides
    Thanks, that was very helpful!
    """.strip().splitlines()
)
