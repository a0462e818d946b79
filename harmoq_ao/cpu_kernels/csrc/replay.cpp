// Calls of operators, recorded once and made again without Python (`replay.py`).

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>

namespace harmoq {
namespace {  // one class per library: torch tells classes by their types

using c10::IValue;

// An argument: a constant, the tensor of a slot, or a list of both.
struct Argument {
  IValue constant;
  int64_t slot = -1;
  std::vector<Argument> items;
  c10::TypePtr element;  // of a list that has a slot
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int64_t> results, free;  // slots that the results go to, and those that nobody reads from here on
};

IValue list_of(const c10::TypePtr& element, const std::vector<IValue>& items) {
  c10::impl::GenericList list(element);
  for (const IValue& item : items) list.push_back(item);
  return list;
}

c10::TypePtr without_optional(const c10::TypePtr& type) {
  const auto optional = type->cast<c10::OptionalType>();
  return optional ? optional->getElementType() : type;
}

// Slot 0 is the input; the others are numbered in the order in which results come. Written by one thread; then `run` by
// any number.
class Replay : public torch::CustomClassHolder {
 public:
  // Begin a call; its arguments follow, all of them and in order.
  void call(const std::string& name, const std::string& overload) {
    complete();
    pending_.emplace(Call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, {}});
  }

  void constant(const IValue& value) { add({converted(value), -1, {}, nullptr}); }

  void slot(int64_t number) {
    TORCH_CHECK(number >= 0 && number < slots_, "replay: no slot ", number);
    add({IValue(), number, {}, nullptr});
  }

  // The next `count` arguments are the items of a list.
  void list(int64_t count) {
    TORCH_CHECK(count >= 0 && !left_, "replay: a list has no list, and not ", count, " items");
    const auto type = without_optional(expected())->cast<c10::ListType>();
    TORCH_CHECK(type, "replay: ", expected()->str(), " is no list");
    items_.clear(), element_ = type->getElementType();
    const Call& current = needed();
    // lists of types are no lists of integers, unlike single ones
    const auto real = current.op.schema().arguments()[current.arguments.size()].real_type()->cast<c10::ListType>();
    if (real && real->getElementType()->kind() == c10::TypeKind::ScalarTypeType) element_ = real->getElementType();
    left_ = count;
    if (count == 0) close_list();
  }

  // The tensors that the call gives (one list of them, or several): their slots are the next ones. Says the first.
  int64_t results(int64_t count) {
    TORCH_CHECK(count >= 0, "replay: ", count, " results");
    Call& current = needed();
    const int64_t first = slots_;
    for (int64_t i = 0; i < count; ++i) current.results.push_back(slots_++);
    return first;
  }

  // What `run` gives.
  void finish(int64_t output) {
    complete();
    TORCH_CHECK(output >= 0 && output < slots_, "replay: no slot ", output);
    output_ = output;
    std::vector<bool> read(slots_);
    read[output] = true;
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      const auto last = [&](int64_t slot) {
        if (!read[slot]) call->free.push_back(slot);
        read[slot] = true;
      };
      for (const int64_t slot : call->results) last(slot);
      for (const Argument& argument : call->arguments) {
        if (argument.slot >= 0) last(argument.slot);
        for (const Argument& item : argument.items) {
          if (item.slot >= 0) last(item.slot);
        }
      }
    }
  }

  at::Tensor run(const at::Tensor& input) const {
    TORCH_CHECK(output_ >= 0, "replay: not finished");
    const at::AutoDispatchBelowADInplaceOrView no_gradients;
    std::vector<at::Tensor> slots(slots_);
    slots[0] = input;
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      for (const Argument& argument : call.arguments) stack.push_back(value(argument, slots));
      call.op.callBoxed(stack);
      size_t next = 0;
      const auto keep = [&](at::Tensor tensor) {
        if (next < call.results.size()) slots[call.results[next]] = std::move(tensor);
        ++next;
      };
      for (const IValue& result : stack) {
        if (result.isTensor()) {
          keep(result.toTensor());
        } else if (result.isTensorList()) {
          for (at::Tensor& item : result.toTensorVector()) keep(std::move(item));
        }
      }
      TORCH_CHECK(next == call.results.size(), "replay: ", call.op.operator_name(), " gives ", next, " tensors, not ",
                  call.results.size());
      stack.clear();
      for (const int64_t slot : call.free) slots[slot].reset();
    }
    return slots[output_];
  }

 private:
  static IValue value(const Argument& argument, const std::vector<at::Tensor>& slots) {
    if (argument.slot >= 0) return slots[argument.slot];
    if (argument.items.empty()) return argument.constant;
    c10::impl::GenericList list(argument.element);
    list.reserve(argument.items.size());
    for (const Argument& item : argument.items) list.push_back(value(item, slots));
    return list;
  }

  Call& needed() {
    TORCH_CHECK(pending_, "replay: there is no call");
    return *pending_;
  }

  // The type of the next argument, or of an item of the list.
  c10::TypePtr expected() {
    if (left_) return element_;
    const Call& current = needed();
    const auto& arguments = current.op.schema().arguments();
    TORCH_CHECK(current.arguments.size() < arguments.size(), "replay: ", current.op.operator_name(), " takes ",
                arguments.size(), " arguments");
    return arguments[current.arguments.size()].type();
  }

  // Python writes floats like integers, and numbers where operators take tensors.
  IValue converted(const IValue& value) {
    const c10::TypeKind kind = without_optional(expected())->kind();
    if (kind == c10::TypeKind::FloatType && value.isInt()) return static_cast<double>(value.toInt());
    if (kind == c10::TypeKind::TensorType && value.isScalar()) return at::native::wrapped_scalar_tensor(value.toScalar());
    return value;
  }

  void add(Argument argument) {
    const c10::TypePtr type = expected();
    const c10::TypePtr given = argument.slot < 0 ? argument.constant.type() : c10::TensorType::get();
    const bool number = type->kind() == c10::TypeKind::ScalarTypeType && given->kind() == c10::TypeKind::IntType;
    TORCH_CHECK(number || given->isSubtypeOf(*type), "replay: ", needed().op.operator_name(), " takes ", type->str(),
                ", got ", given->str());
    if (!left_) return needed().arguments.push_back(std::move(argument));
    items_.push_back(std::move(argument));
    if (--*left_ == 0) close_list();
  }

  void close_list() {
    Argument list{IValue(), -1, {}, element_};
    std::vector<IValue> constants;
    for (const Argument& item : items_) {
      if (item.slot < 0) constants.push_back(item.constant);
    }
    if (constants.size() == items_.size()) {
      list.constant = list_of(element_, constants);
    } else {
      list.items = std::move(items_);
    }
    items_.clear(), left_.reset();
    needed().arguments.push_back(std::move(list));
  }

  void complete() {
    TORCH_CHECK(!left_ && output_ < 0, "replay: a list is not complete, or nothing may follow");
    if (!pending_) return;
    TORCH_CHECK(pending_->arguments.size() == pending_->op.schema().arguments().size(), "replay: ",
                pending_->op.operator_name(), " takes ", pending_->op.schema().arguments().size(), " arguments, got ",
                pending_->arguments.size());
    calls_.push_back(std::move(*pending_));
    pending_.reset();
  }

  std::vector<Call> calls_;
  std::optional<Call> pending_;
  std::optional<int64_t> left_;  // items of the list that are still to come
  std::vector<Argument> items_;
  c10::TypePtr element_;
  int64_t slots_ = 1, output_ = -1;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.class_<Replay>("Replay")
      .def(torch::init<>())
      .def("call", &Replay::call)
      .def("constant", &Replay::constant)
      .def("slot", &Replay::slot)
      .def("list", &Replay::list)
      .def("results", &Replay::results)
      .def("finish", &Replay::finish)
      .def("run", &Replay::run);
}

}  // namespace harmoq
