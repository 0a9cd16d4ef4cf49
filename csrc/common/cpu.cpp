#include "cpu.h"

#include <cstdlib>
#include <cstring>

#include "ranges.h"

namespace fastcl {

namespace {

Isa detect() {
  Isa found = Isa::baseline;
#ifdef FASTCL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = Isa::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    found = Isa::avx512;
#endif
  if (const char* wanted = std::getenv("FASTCL_CPU")) {
    if (std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0) return std::min(found, Isa::avx2);
  }
  return found;
}

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

}  // namespace

Isa isa() {
  static const Isa level = detect();
  return level;
}

const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline"; }

bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const int64_t dim = t.dim();
  if (dim > 16) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  // Sort the dimensions by stride; each stride must then be the product of the smaller dimensions' sizes.
  int order[16], used = 0;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    int at = used++;
    for (; at > 0 && strides[order[at - 1]] > strides[d]; --at) order[at] = order[at - 1];
    order[at] = static_cast<int>(d);
  }
  int64_t expected = 1;
  for (int k = 0; k < used; ++k) {
    if (strides[order[k]] != expected) return false;
    expected *= sizes[order[k]];
  }
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), mine = a.strides(), theirs = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && mine[d] != theirs[d]) return false;
  return true;
}

// Sorted by stride, every dimension must step over all that the smaller ones reach.
bool overlaps_itself(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return false;
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

void check_output(const Tensor& t, const char* op, Name name) {
  FASTCL_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  if (is_dense(t)) return;
  FASTCL_CHECK(!overlaps_itself(t), op, ": ", name,
               " overlaps itself (an expanded tensor): write to a contiguous clone instead");
}

void check_like(const Tensor& t, const Tensor& like, const char* op, Name name, Name like_name) {
  FASTCL_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor like ", like_name);
  const auto mine = t.sizes(), theirs = like.sizes();
  const bool same = mine.size() == theirs.size() && std::equal(mine.begin(), mine.end(), theirs.begin());
  FASTCL_CHECK(same, op, ": ", name, " has shape ", shape_of(t), " but must have the shape of ", like_name, ", ",
               shape_of(like));
}

void check_same_dtype(const Tensor& t, const Tensor& like, const char* op, Name name, Name like_name) {
  FASTCL_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name);
}

void check_lengths(size_t n, size_t expected, const char* op, const char* name, const char* like_name) {
  FASTCL_CHECK(n == expected, op, ": ", name, " has ", n, " tensors but must have as many as ", like_name, ", ",
               expected);
}

size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short:
      return 2;
    default:
      return 1;
  }
}

namespace {

Range range_of(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return {begin, begin};
    last += (sizes[d] - 1) * strides[d];
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(element_size(t.scalar_type()))};
}

}  // namespace

void check_distinct(const Tensors& outputs, const std::vector<const Tensors*>& inputs, const char* op,
                    const char* output_name, const std::vector<const char*>& input_names) {
  Written written;
  for (size_t i = 0; i < outputs.size(); ++i) written.add(range_of(outputs[i]), i);
  written.sort();
  if (const auto both = written.overlap())
    fail(op, ": ", item(output_name, both->first), " shares memory with ", item(output_name, both->second),
         ": each must have its own");
  for (size_t list = 0; list < inputs.size(); ++list)
    for (size_t i = 0; i < inputs[list]->size(); ++i)
      if (const auto other = written.overlap(range_of((*inputs[list])[i])))
        fail(op, ": ", item(input_names[list], i), " shares memory with ", item(output_name, *other),
             ", which is written");
}

Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);  // keeps a dense tensor's memory order
  if (copy.scalar_type() != t.scalar_type()) copy = torch::stable::to(copy, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// The check costs nothing; torch::stable::contiguous looks an op up by name.
Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor without_gaps(const Tensor& t) { return is_dense(t) ? t : in_layout_of(t, torch::stable::empty_like(t)); }

}  // namespace fastcl
