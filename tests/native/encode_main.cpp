// Calls one function of encode.cpp with what comes on stdin: for tests on a processor that is only emulated.
// In: the function's number, the count of arguments; for each argument a kind (0 a number, 1 memory, 2 no memory)
// and the number, or the size and the bytes. Out: the answer, and all memory as it is afterwards.
#include <cstdio>
#include <vector>

#include "encode.cpp"

static int64_t number() {
    int64_t value = 0;
    if (std::fread(&value, 8, 1, stdin) != 1) std::abort();
    return value;
}

template <class... Types, size_t... I>
static int64_t called(int64_t (*f)(Types...), const int64_t* a, std::index_sequence<I...>) {
    return f((Types)a[I]...);
}

template <class... Types>
static int64_t called(int64_t (*f)(Types...), const int64_t* a) {
    return called(f, a, std::index_sequence_for<Types...>{});
}

static int64_t call(int64_t function, const int64_t* a) {
    switch (function) {
        case 0: return called(encode_table, a);
        case 1: return called(encode_choice, a);
        case 2: return called(encode_rule, a);
        case 3: return called(encode_dual, a);
        case 4: return called(encode_rows, a);
        case 5: return called(search, a);
        case 6: return called(measure, a);
        case 7: return called(encode_tiles, a);
    }
    std::abort();
}

int main() {
    const int64_t function = number(), count = number();
    std::vector<std::vector<char>> memory(count);
    std::vector<int64_t> arguments(count);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t kind = number(), value = number();
        arguments[i] = kind == 0 ? value : 0;
        if (kind != 1) continue;
        memory[i].resize(value);
        if (std::fread(memory[i].data(), 1, value, stdin) != size_t(value)) std::abort();
        arguments[i] = (int64_t)memory[i].data();
    }
    const int64_t answer = call(function, arguments.data());
    std::fwrite(&answer, 8, 1, stdout);
    for (const auto& m : memory)
        if (!m.empty()) std::fwrite(m.data(), 1, m.size(), stdout);
}
